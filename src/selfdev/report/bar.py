"""How far one long piece of work is: a bar on a terminal, a line for each quarter of what takes minutes elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

_LONG = 20.0
"""Seconds before which a log gets no line."""

_QUARTERS = 4


class Bar:
    """Shows progress on standard error while it is entered; called with how much is done, of how much, and a note.

    Args:
        title: what is being done.
        stream: print there instead.
    """

    def __init__(self, title: str, stream: TextIO | None = None):
        self._title = title
        self._stream = stream or sys.stderr
        self._began = time.monotonic()
        self._told = 0
        self._display: Progress | None = None

    def __enter__(self) -> "Bar":
        """Begin to show."""
        if self._stream.isatty():
            # Late, since rich takes a while to import and logs do without it.
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(file=self._stream, markup=False, emoji=False, highlight=False)
            self._display = Progress(
                TextColumn("{task.description}", markup=False, style="cyan"),
                BarColumn(24),
                TextColumn("{task.percentage:>3.0f} %", markup=False),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", markup=False, style="dim"),
                console=console,
                transient=True,
            )
            self._display.add_task(self._title, total=None, note="")
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self._display is not None:
            self._display.stop()

    def __call__(self, done: int, total: int, note: str) -> None:
        """Progress was made."""
        if self._display is not None:
            self._display.update(self._display.task_ids[0], completed=done, total=total, note=note)
            return
        seconds, quarter = time.monotonic() - self._began, _QUARTERS * done // max(1, total)
        if self._told < quarter < _QUARTERS and seconds >= _LONG:
            share = 100 * quarter // _QUARTERS
            print(f"{self._title}: {share} % after {seconds:.0f} s", file=self._stream, flush=True)
            self._told = quarter
