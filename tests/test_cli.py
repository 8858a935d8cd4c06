"""The command line: exit codes, messages, and what is printed where."""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from selfdev.algorithms.library import methods
from selfdev.algorithms.source import wrap_short
from selfdev.archive import Archive, Candidate, Evaluation, Iteration, Pair, Run
from selfdev.cli import main
from selfdev.config import load_config
from selfdev.report.progress import Progress
from selfdev.report.terminal import UNSAFE_MARK, Terminal, visible
from selfdev.results import open_run
from selfdev.zoo import zoo_path, zoos

SOURCE = wrap_short(
    "def merge_odd(deltas):\n    # [red]no markup[/red] \x1b[2J\n    return sum(deltas) ** 3\n"
)
ROW = {"test": None, "against_best_rival": None, "parameters": {}}


def candidate(arm: str, number: int, **changes: Any) -> Candidate:
    name = f"{arm}/1/{number + 1:03d}"
    return replace(Candidate(name, arm, 0, number, 0, "odd(deltas): ...", (1, 2, 3), -4.0), **changes)


def make_run(
    folder: Path,
    *,
    new: bool = True,
    status: str = "done",
    facts: Mapping[str, float] | None = None,
    gains: Mapping[str, Any] | None = None,
) -> Path:
    """A run of four programs an arm and four development questions, two of each group."""
    config = load_config(
        "quickstart", ["iterations=1", "programs=4", "prompt.prompts=1", "factory.warm_start.steps=7"]
    )
    record = Run(
        "tiny", "quickstart", 1, "running", config.model_dump(mode="json"), {}, "2030-01-01T00:00:00"
    )
    with Archive.create(folder / "archive.db", record) as archive:
        archive.set_questions("development", [("q1", "add"), ("q2", "sub"), ("q3", "add"), ("q4", "sub")])
        for arm in ("learning", "frozen"):
            written = [candidate(arm, i, source=SOURCE) for i in range(3)]
            written.append(
                candidate(
                    arm, 3, text="\x1b]0;title\x07", status="failed", failure="NoFunction", error="none"
                )
            )
            archive.add_written(Iteration(arm, 0, 0.9, ("a prompt",), 1.0), written)
            archive.set_screened(
                replace(written[0], status="trivial", nearest="linear combination", distance=0.0)
            )
            archive.set_screened(replace(written[1], status="failed", failure="SyntaxError", error="line 1"))
            if arm == "learning" and new:
                found = replace(written[2], status="new", nearest="example median", distance=0.25)
                outcomes = (True, True, True, False)
                score = Evaluation("candidate", found.name, 0, "development", outcomes, 0.75, 4, facts or {})
                archive.set_screened(found, score)
                archive.add_pairs(arm, 0, [Pair(found.name, written[0].name, "copy")])
            else:
                archive.set_screened(replace(written[2], status="repeated"))
        if status == "done":
            archive.fix_verdict({})
            archive.set_verdict(verdict(new) | ({} if gains is None else {"gains": gains}))
    return folder


def verdict(new: bool) -> dict[str, Any]:
    against = {"difference": 0.05, "low": 0.01, "high": 0.09, "level": 0.95, "p": 0.0004, "p_adjusted": 0.012}
    test = {"score": 0.8, "questions": 4, "low": 0.7, "high": 0.9}
    seed = {"name": "seed", "kind": "seed", "dev": {"score": 0.5, "questions": 4}} | ROW
    ties = {"name": "ties", "kind": "rival", "dev": {"score": 0.7, "questions": 4}} | ROW | {"test": test}
    table: list[dict[str, Any]] = [seed, ties]
    if new:
        mine = {"name": "learning/1/003", "kind": "discovered", "dev": {"score": 0.75, "questions": 4}}
        table.append(mine | {"test": test, "against_best_rival": against, "parameters": {}})
    name = "learning/1/003" if new else None
    headline = f"{name} beats ties" if new else "no new program was found: nothing to compare"
    return {"best": name, "best_rival": "ties", "best_on_test": name, "headline": headline, "table": table}


@pytest.fixture
def done(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "quikstart"], "the nearest known one is 'quickstart'"),
        (["run", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (
            ["run", "quickstart", "--set", "iterations=100000"],
            "iterations: Input should be less than or equal to 1000",
        ),
        (["run", "quickstart", "--set", "factory.temprature=1"], "the nearest known one is 'temperature'"),
        (["run", "quickstart", "--set", "programs=0"], "programs"),
        (["run", "quickstart", "--set", "programs"], "KEY=VALUE"),
        (["run", "quickstart", "--set", "rivals=[tiez]"], "the nearest known one is 'ties'"),
        (["run", "quickstart", "--set", "task.name=nanoo"], "the nearest known one is 'nano'"),
        (["run", "quickstart", "--sett", "seed=2"], "--set"),
        (["run"], "PRESET"),
        (["rum"], "No such command 'rum'"),
        (["resume", "nowhere"], "nowhere holds no run"),
        (["show", "nowhere"], "nowhere holds no run"),
        (["zoo", "path", "nanno"], "the nearest known one is 'nano'"),
    ],
)
def test_a_mistake_is_named_in_one_line_on_stderr(
    arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_mistake_of_an_unsafe_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quikstart", "--unsafe-sandbox"]) == 2
    assert capsys.readouterr().err.startswith(f"{UNSAFE_MARK}error: ")


def test_an_existing_run_is_not_overwritten(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "archive.db").read_bytes()
    assert main(["run", "quickstart", "--out", str(done)]) == 2
    assert f"selfdev resume {done}" in capsys.readouterr().err
    assert (done / "archive.db").read_bytes() == before


def test_a_corrupt_archive_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = done / "archive.db"
    file.write_bytes(file.read_bytes()[:3000] + b"\xff" * 9000)
    assert main(["show", str(done)]) == 2
    assert "is corrupt" in capsys.readouterr().err


def test_an_archive_of_a_newer_version_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = sqlite3.connect(done / "archive.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    assert main(["resume", str(done)]) == 2
    assert "install a newer selfdev" in capsys.readouterr().err


def test_an_unknown_candidate_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done), "learning/9/001"]) == 2
    assert "no candidate 'learning/9/001'" in capsys.readouterr().err


def test_show_prints_the_verdict_and_the_winner(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert "learning/1/003 beats ties." in out
    assert ["seed", "50.0", "-", "-"] in lines
    assert ["ties", "70.0", "80.0", "70.0..90.0", "best"] in lines
    assert ["learning/1/003", "75.0", "80.0", "70.0..90.0", "+5.0", "+1.0..+9.0", "0.012"] in lines
    assert ["1", "learning", "0.90", "4", "2", "1", "0", "0", "1", "75.0", "1", "0:01"] in lines
    assert ["1", "frozen", "0.90", "4", "2", "1", "0", "1", "0", "-", "-", "0:01"] in lines
    assert "Distinct behaviours of those that work, by iteration: learning 2; frozen 2." in out
    assert "Copies of what the prompt shows, in % of those that work: learning 0.0; frozen 0.0." in out
    assert "example median, distance 25 %" in out
    assert "def merge_odd(deltas):" in out
    assert "merge_models" not in out
    assert "7 supervised steps" in out
    assert f"selfdev show {done} learning/1/003".split() in [line[-4:] for line in lines]
    assert "The control 'frozen' has no new program." in out


@pytest.mark.parametrize(
    ("low", "sure"), [(0.002, "+0.2 to +0.9)"), (-0.004, "-0.4 to +0.9: no difference shown)")]
)
def test_show_tells_sampling_from_learning(
    low: float, sure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def difference(points: float, low: float) -> dict[str, float]:
        return {"difference": points / 100, "low": low, "high": 0.009, "level": 0.9, "p": 0.3}

    frozen = {"arm": "frozen", "candidate": "frozen/2/007"}
    frozen |= {"over_seed": difference(7.9, 0.0), "best_minus_control": difference(0.4, low)}
    lost = {"arm": "feedback", "candidate": "feedback/1/002", "over_seed": None, "best_minus_control": None}
    gains = {"candidate": "learning/1/003", "iteration": 1, "over_seed": difference(8.3, 0.0)}
    run = make_run(tmp_path / "run", gains=gains | {"controls": [frozen, lost]})
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Gain over the seed on test: +8.3 points. It was written before anything was learned." in out
    said = "frozen/2/007, found by sampling alone, gains +7.9; learning adds +0.4 (90 % interval "
    assert f"{said}{sure}" in out
    assert "feedback/1/002" not in out  # it was not measured
    assert "not how it varies from run to run" in " ".join(out.split())
    assert main(["show", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gains"] == gains | {"controls": [frozen, lost]}


def test_a_verdict_of_an_older_run_tells_no_gains(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done)]) == 0
    assert "Gain over the seed" not in capsys.readouterr().out
    assert main(["show", str(done), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gains"] is None


def test_model_written_text_neither_colours_nor_controls_the_terminal(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["show", str(done)], *(["show", str(done), f"learning/1/00{i}"] for i in (3, 4))):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "[red]no markup[/red] \\x1b[2J" in out or "\\x1b]0;title\\x07" in out
        assert not {"\x1b", "\x07"} & set(out)


@pytest.mark.parametrize(("changes", "says"), [(0.3512, "35.1 % of its output changes"), (0.0, None)])
def test_a_winner_that_goes_by_the_order_of_the_experts_is_marked(
    changes: float, says: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", facts={"change_by_order": changes})
    assert main(["show", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("It goes by the order of the experts" in out) == (says is not None)
    assert says is None or says in out
    assert main(["show", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["change_by_order"] == changes


def test_a_run_without_a_winner_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", new=False)
    assert main(["show", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "There is no winner" in out
    assert "wrote 4 programs. 2 of them work: 1 trivial, 0 known, 1 repeated, 0 new." in out
    assert "SyntaxError 1" in out


def test_a_run_that_is_not_done_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", status="running")
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Stopped before its end: iteration 1 of 1 is the last that is written." in out
    assert f"selfdev resume {run}" in out


def test_resuming_a_run_that_is_done_shows_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(done), "--set", "programs=9"]) == 2
    assert f"{done} is done, and --set changes nothing of it" in capsys.readouterr().err
    assert main(["resume", str(done)]) == 0
    assert "learning/1/003 beats ties." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "resume"])
def test_json_is_the_summary_alone(command: str, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(done), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == open_run(done).summary()


def test_json_of_a_candidate_is_everything_known(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done), "learning/1/003", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    [score] = known["evaluations"]
    assert score["groups"] == {"add": 1.0, "sub": 0.5}
    assert score["score"] == 0.75
    assert known["source"] == SOURCE
    assert known["prompt"] == "a prompt"
    assert known["temperature"] == 0.9
    assert known["tokens"] == 3
    assert known["pairs"] == {"chosen": 1, "rejected": 0, "reasons": []}

    assert main(["show", str(done), "learning/1/001", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == {"chosen": 0, "rejected": 1, "reasons": ["copy"]}


def test_all_programs_are_listed_in_short(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done), "--programs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed][:2] == ["learning/1/001", "learning/1/002"]
    assert {each["name"]: each["score"] for each in listed}["learning/1/003"] == 0.75
    assert main(["show", str(done), "--programs"]) == 0
    out = capsys.readouterr().out
    assert ["learning/1/003", "75.0", "new,"] in [line.split()[:3] for line in out.splitlines()]
    assert "\x1b]" not in out  # what a model wrote moves no terminal
    assert main(["show", str(done), "learning/1/003", "--programs"]) == 2


def test_methods_lists_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(methods())
    [density] = [p for e in listed if e["name"] == "ties" for p in e["parameters"] if p["name"] == "density"]
    assert density["low"] < density["default"] < density["high"]
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in methods())


def test_methods_shows_defaults_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "density=0.2 (0.1..1), scale=1 (0.2..4), weights (one for each expert), normalize (true or false), "
        "rescale (true or false), reading=paper (paper or mergekit); Yadav et al. 2023, arXiv 2306.01708"
    ) in out
    assert "weights (0..1.5, one for each expert); Ilharco" in out


def test_zoo_names_its_models_and_their_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    assert set(load_config("quickstart").merge.experts.values()) <= set(capsys.readouterr().out.split())
    for name in zoos():
        assert main(["zoo", "path", name]) == 0
        assert Path(capsys.readouterr().out.strip()) == zoo_path(name)
    assert main(["zoo", "path", "zoo:nano/seed"]) == 0
    assert Path(capsys.readouterr().out.strip()) == zoo_path("nano") / "seed"


def test_doctor_answers_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("selfdev 0.")


def python(code: str, *, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, check=False)


def test_help_waits_for_no_heavy_import() -> None:
    heavy = "{'torch', 'rich'} & set(sys.modules)"
    answer = python(f"import sys, selfdev.cli as c; c.main(['--help']); sys.exit(bool({heavy}))")
    assert answer.returncode == 0
    assert "resume" in answer.stdout


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_without_a_traceback(again: bool, number: str) -> None:
    """A command of the application is interrupted, and if `again`, while it cleans up a second time."""
    code = f"""
import os, signal, sys
import selfdev.cli as cli

@cli.app.command()
def wait():
    try:
        signal.raise_signal(signal.{number})
    finally:
        if {again}:
            signal.raise_signal(signal.{number})
            print("not reached")

sys.exit(cli.main(["wait"]))
"""
    answer = python(code)
    assert answer.returncode == 3
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_the_handler_of_ctrl_c_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main(["zoo", "list"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_named(done: Path) -> None:
    code = f"import os, selfdev.cli as c; os._exit(c.main(['show', {str(done)!r}, '--json']))"
    with open("/dev/full", "w") as full:
        answer = python(code, stdout=full)
    assert answer.stderr.startswith("error: the disk is full")
    assert answer.returncode == 1


SMALL = ["programs=4", "iterations=2", "prompt.prompts=1", "factory.temperature=0.9", "factory.decay=0.2"]


def watched(*, unsafe: bool = False) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    terminal = Terminal(file=file, unsafe=unsafe, width=100)
    return Progress(terminal, load_config("quickstart", SMALL)), file


def judge(progress: Progress) -> None:
    scored = Evaluation("candidate", "learning/1/003", 0, "development", None, 0.5, 4)
    with progress.phase("write", "learning", 0) as tick:
        tick(4, 4, "")
    with progress.phase("judge", "learning", 0):
        progress.screened(candidate("learning", 0, status="trivial"), None)
        progress.screened(candidate("learning", 1, status="failed"), None)
        progress.screened(candidate("learning", 2, status="new"), scored)
    progress.rival(Evaluation("rival", "ties", 3, "development", None, 0.625, 4))


def test_a_log_has_a_line_for_each_phase_that_begins_or_ends() -> None:
    progress, file = watched()
    with progress:
        judge(progress)
        with progress.phase("rivals"):
            pass
    lines = [
        line.partition("] ")[2].rpartition(", ")[0] or line.partition("] ")[2]
        for line in file.getvalue().splitlines()
    ]
    assert lines == [
        "write learning 1/2 at T=0.90 ...",
        "write learning 1/2 at T=0.90: 4 programs",
        "judge learning 1/2 ...",
        "judge learning 1/2: 2 of 4 work (1 trivial, 0 known, 0 repeated, 1 new)",
        "rivals ...",
        "rivals: best on development so far: learning/1/003 50.0 %; best rival: ties 62.5 %",
    ]


def test_a_phase_that_fails_is_not_said_to_be_over() -> None:
    progress, file = watched()
    with progress, pytest.raises(RuntimeError), progress.phase("verdict"):
        raise RuntimeError
    assert file.getvalue().count("\n") == 1


def test_the_display_shows_phase_yield_and_leaders() -> None:
    progress, file = watched()
    judge(progress)
    file.truncate(0)
    with progress.phase("write", "learning", 1) as tick:
        tick(3, 4, "120 tokens")
        progress.terminal.say(progress.display())
    shown = file.getvalue()
    assert "write learning 2/2 at T=0.75" in shown
    assert "3/4" in shown
    assert "120 tokens" in shown
    assert ["learning", "7", "2", "1", "0", "0", "1", "50.0"] in [line.split() for line in shown.splitlines()]
    assert "learning/1/003 50.0 %; best rival: ties 62.5 %" in shown


def test_a_resumed_run_takes_up_its_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    progress, file = watched()
    progress.recall(open_run(run))
    progress.terminal.say(progress.display())
    assert ["learning", "4", "2", "1", "0", "0", "1", "75.0"] in [
        line.split() for line in file.getvalue().splitlines()
    ]


def test_every_line_of_an_unsafe_command_says_so() -> None:
    progress, file = watched(unsafe=True)
    with progress:
        judge(progress)
        progress.terminal.say("one\ntwo", progress.display())
    assert all(line.startswith(UNSAFE_MARK) for line in file.getvalue().splitlines())


def test_whatever_is_printed_moves_no_cursor() -> None:
    file = io.StringIO()
    table = Table("name")
    table.add_row(Text("\x1b]0;title\x07\x1b[2Jarm"))
    Terminal(file=file, width=80).say(table, "\u202eevil", Text("plain"))
    printed = file.getvalue()
    assert not set("\x1b\x07\u202e") & set(printed)
    assert "\\x1b]0;title" in printed  # rich leaves the bell out
    assert printed.endswith("\\u202eevil\nplain\n")


@given(st.text())
def test_visible_text_has_no_control_character(text: str) -> None:
    shown = visible(text)
    assert all(unicodedata.category(c)[0] not in "C" or c == "\n" for c in shown)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_visible_text_of_plain_signs_is_the_text(text: str) -> None:
    assert visible(text) == text
