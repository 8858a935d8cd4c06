"""The test split of a run: shut until the verdict, opened once, and marked where it is opened again."""

import json
import shutil
import sqlite3
from collections.abc import Hashable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.archive import Archive, Run, TestSealed
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.evaluation.evaluator import Evaluator
from selfdev.evaluation.tasks import load_task
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.runs import resume, run
from selfdev.sandbox import Sandbox
from selfdev.watcher import Silent, Tick
from selfdev.zoo import zoo_models

FACTORY = ScriptedFactory(PROGRAMS[:2])


class Peeks(Silent):
    """Tries to open the test split in every phase of a run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.refused: list[str] = []

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        if (self.folder / "archive.db").exists() and name != "verdict":
            with Archive.open(self.folder / "archive.db") as archive:
                with pytest.raises(TestSealed, match="its last iteration is not over"):
                    archive.opened("nano")
                assert archive.openings() == []
            self.refused.append(name)
        with super().phase(name, arm, iteration) as tick:
            yield tick


@pytest.fixture(scope="module")
def peeked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peeks]:
    folder = tmp_path_factory.mktemp("sealed") / "run"
    watch = Peeks(folder)
    config = scripted_config(iterations=1, programs=2, rivals=["task_arithmetic"])
    run(config, folder, factory=FACTORY, watch=watch)
    return folder, watch


def test_no_phase_before_the_verdict_opens_it(peeked: tuple[Path, Peeks]) -> None:
    folder, watch = peeked
    assert {"write", "judge", "rivals"} <= set(watch.refused)
    with Archive.open(folder / "archive.db", read_only=True) as archive:
        assert [opening.again for opening in archive.openings()] == [False]


def test_reading_it_early_fails_and_leaves_no_trace(peeked: tuple[Path, Peeks], tmp_path: Path) -> None:
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "mlp")
    record = Run("r", "p", 1, "running", {}, {}, "2026-01-01")
    with Archive.open(peeked[0] / "archive.db", read_only=True) as finished:
        [program, *_] = finished.candidates()
    with Archive.create(tmp_path / "archive.db", record) as archive, Sandbox() as box:
        scorer = Evaluator(zoo["seed"], vectors, load_task("nano"), 12, box, 1)
        for early in (
            lambda: scorer.open_test(12, archive),
            lambda: scorer.questions("test"),
            lambda: scorer.seed("test"),
            lambda: scorer.candidate(program, "test"),
            lambda: scorer.rival("task_arithmetic", 0, {}, "test"),
        ):
            with pytest.raises(TestSealed):
                early()
        assert archive.openings() == []
        archive.set_status("verdict")
        scorer.open_test(12, archive)
        assert scorer.seed("test").questions == 12
        assert len(archive.openings()) == 1


def test_again_measures_anew_is_marked_and_keeps_what_stood_before(
    peeked: tuple[Path, Peeks], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(peeked[0], tmp_path / "run"))
    before = resume(folder, factory=FACTORY)  # nothing is left to do
    assert len(before.archive.openings()) == 1
    first = before.verdict
    assert first is not None
    before.archive.close()
    again = resume(folder, factory=FACTORY, again=True)
    assert again.verdict == first
    assert [o.again for o in again.archive.openings()] == [False, True]
    assert again.archive.openings()[1].before == first
    assert main(["show", str(folder)]) == 0
    assert "The test split was opened again (--again) on" in " ".join(capsys.readouterr().out.split())
    assert main(["show", str(folder), "--json"]) == 0
    [marked] = json.loads(capsys.readouterr().out)["run"]["test_opened_again"]
    assert marked["headline_before"] == first["headline"]


def test_what_the_headline_compares_stays_as_it_was_fixed(peeked: tuple[Path, Peeks], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(peeked[0], tmp_path / "run"))
    resume(folder, factory=FACTORY, again=True).archive.close()  # the same version finds the same
    with closing(sqlite3.connect(folder / "archive.db")) as database, database:
        database.execute("UPDATE verdict SET fixed = json_set(fixed, '$.best', 'learning/1/009')")
    with pytest.raises(
        UserError, match=r"best was fixed as 'learning/1/009' before .* would be 'learning/1/00"
    ):
        resume(folder, factory=FACTORY, again=True)


def test_questions_of_one_family_stay_together_in_the_verdict(
    peeked: tuple[Path, Peeks], tmp_path: Path
) -> None:
    """The verdict's p value is that of the families, and not that of the questions, where these are reworded."""
    folder = Path(shutil.copytree(peeked[0], tmp_path / "run"))
    task = load_task("nano")

    def of_one_family(self: Evaluator, split: str) -> list[Hashable]:
        return ["all"] * len(self.questions(split))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "families", of_one_family)
        told = resume(folder, factory=FACTORY, again=True).verdict["table"]
    compared = [row["against_best_rival"] for row in told if row["against_best_rival"]]
    assert compared
    assert all(each["test"] == "stratified paired permutation" for each in compared)
    assert all(
        each["low"] == pytest.approx(each["high"]) for each in compared
    )  # of one family, none can be left out
    assert len(set(task.families(task.development(600, 1)))) < 600  # sums of the same digits


def test_without_a_verdict_there_is_nothing_to_open_again(peeked: tuple[Path, Peeks], tmp_path: Path) -> None:
    with Archive.open(peeked[0] / "archive.db", read_only=True) as archive:
        record = replace(archive.run, status="running")
    Archive.create(tmp_path / "archive.db", record).close()
    with pytest.raises(UserError, match="has no verdict yet"):
        resume(tmp_path, factory=FACTORY, again=True)
