"""The bar of long work: alive on a terminal, next to silent in a log."""

import io
import re

import pytest

from selfdev.report.bar import Bar


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_share_and_note_and_is_clean_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Screen()
    with Bar("merging", screen) as bar:
        bar(25, 100, "model.[bold]norm")
    shown = screen.getvalue()
    assert re.search(r"merging.*25 %.*model\.\[bold\]norm", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown))
    assert shown.endswith("\x1b[2K"), "the line is erased"


def test_a_log_gets_a_line_a_quarter_and_none_of_what_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = io.StringIO()
    with Bar("merging", log) as bar:
        bar(30, 100, "")
        assert log.getvalue() == ""
        for done in range(40, 101):
            now[0] = float(done)
            bar(done, 100, "")
    assert log.getvalue().splitlines() == [
        "merging: 25 % after 40 s",
        "merging: 50 % after 50 s",
        "merging: 75 % after 75 s",
    ]
