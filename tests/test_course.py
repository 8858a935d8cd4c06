"""A race within a run: with scripted outcomes between any two steps, and once with real merges."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.archive import Archive, Candidate, Evaluation, Iteration, Run
from selfdev.config import Config
from selfdev.errors import Interrupted
from selfdev.evaluation.course import Course
from selfdev.evaluation.evaluator import Refused
from selfdev.evaluation.objective import Objective, pareto_set
from selfdev.evaluation.standing import ranked_new, scores_on_first
from selfdev.preferences import prefer
from selfdev.runs import resume, run
from selfdev.watcher import Silent, Tick

GROUPS = ["x", "y"] * 60
ABILITIES = (0.9, 0.85, 0.8, 0.2, 0.1, 0.0)


def config(**task: object) -> Config:
    return scripted_config(
        race={"first": 40, "growth": 2.0},
        preferences={"elites": 2, "chosen_floor": 1},
        task={"name": "nano", "development": 120, "test": 240, **task},
    )


class Killed(Exception):
    """The process ends here."""


class Outcomes:
    """Outcomes decided beforehand; may die before the n-th question, or fail a program on later questions."""

    def __init__(self, die_at: int = -1, failing: str = ""):
        self.table = np.random.default_rng(0).random((len(ABILITIES), 120)) < np.array(ABILITIES)[:, None]
        self.left, self.failing, self.asked = die_at, failing, 0

    def candidate(self, candidate: Candidate, split: str, asked: Sequence[int] | None = None) -> Evaluation:
        if self.left == 0:
            raise Killed
        self.left -= 1
        positions = range(120) if asked is None else asked
        if candidate.name == self.failing and candidate.status == "new":
            raise Refused("Timeout", "too slow")
        self.asked += len(positions)
        outcomes = tuple(bool(self.table[candidate.number, position]) for position in positions)
        score = Objective().score([GROUPS[position] for position in positions], outcomes)
        return Evaluation(
            *("candidate", candidate.name, 0, split, outcomes, score, len(outcomes)),
            asked=None if asked is None else tuple(asked),
        )


def new_archive(folder: Path, settings: Config) -> Archive:
    record = Run("r", "p", 1, "running", settings.model_dump(mode="json"), {}, "2026-01-01T00:00:00+00:00")
    archive = Archive.create(folder / "archive.db", record)
    archive.set_questions("development", [(str(i), group) for i, group in enumerate(GROUPS)])
    archive.add_evaluation(Evaluation("seed", "seed", 0, "development", (True,) * 120, 1.0, 120))
    written = [
        Candidate(f"learning/1/{n}", "learning", 0, n, 0, "", source="s") for n in range(len(ABILITIES))
    ]
    archive.add_written(Iteration("learning", 0, 1.0, ("p",), 0.0), written)
    return archive


def judge(archive: Archive, settings: Config, scorer: Outcomes) -> list[str]:
    """What the cycle does with an iteration whose programs are all new."""
    course = Course(archive, settings, "learning", 0)
    for candidate in archive.candidates():
        if candidate.status is None:
            found = course.start(scorer, candidate)  # type: ignore[arg-type]
            archive.set_screened(replace(candidate, status="new"), found)
    return [e.subject for e in course.finish(scorer, lambda note: None)]  # type: ignore[arg-type]


def questions(archive: Archive) -> dict[str, int]:
    return {e.subject: e.questions for e in archive.evaluations("candidate")}


def test_the_hopeless_leave_and_every_score_says_on_what_it_rests(tmp_path: Path) -> None:
    archive, scorer = new_archive(tmp_path, config()), Outcomes()
    finished = judge(archive, config(), scorer)
    asked = questions(archive)
    assert finished == [name for name, count in asked.items() if count == 120]
    assert set(finished) >= {"learning/1/0", "learning/1/1"}
    assert asked["learning/1/5"] < 120
    assert sum(asked.values()) == scorer.asked  # nobody was asked a question twice
    order = next(e.asked for e in archive.evaluations("candidate", finished[0]))
    for e in archive.evaluations("candidate"):
        assert e.asked == order[: e.questions]  # type: ignore[index]
        table = scorer.table[int(e.subject[-1])]
        assert e.outcomes == tuple(table[list(e.asked)])  # type: ignore[arg-type]
        assert e.score == pytest.approx(table[list(e.asked)].mean())  # type: ignore[arg-type]
        assert e.first_questions == 40
        assert e.first_score == pytest.approx(table[list(e.asked[:40])].mean())  # type: ignore[index]
    assert [c.name for c, _ in ranked_new(archive, "learning")] == sorted(
        finished, key=lambda name: -scorer.table[int(name[-1])].mean()
    )


@pytest.mark.parametrize(
    ("preferences", "kept"),
    [
        ({"chosen_share": 0.03, "elites": 3}, 90),
        ({"chosen_share": 0.0301, "elites": 3}, 91),
        ({"chosen_share": 0.001, "elites": 5}, 5),
        ({"chosen_share": 0.001, "elites": 0, "chosen_floor": 12}, 12),
    ],
)
def test_a_race_looks_for_as_many_as_are_chosen(
    preferences: dict[str, float], kept: int, tmp_path: Path
) -> None:
    settings = scripted_config(programs=3000, race={"first": 40}, preferences=preferences)
    assert Course(new_archive(tmp_path, settings), settings, "learning", 0).keep == kept


def test_all_that_are_chosen_finish_the_race(tmp_path: Path) -> None:
    one = config()
    # Of 16 programs a quarter is chosen: four, and one of them is far behind the best three.
    four = one.model_copy(update={"preferences": one.preferences.model_copy(update={"chosen_share": 0.25})})
    assert "learning/1/3" not in judge(new_archive(tmp_path / "one", one), one, Outcomes())
    assert "learning/1/3" in judge(new_archive(tmp_path / "four", four), four, Outcomes())


@pytest.mark.parametrize("failing", ["", "learning/1/1"])
def test_killed_between_any_two_steps_it_ends_as_it_would_have_ended(failing: str, tmp_path: Path) -> None:
    unbroken = new_archive(tmp_path, config())
    judge(unbroken, config(), Outcomes(failing=failing))
    for step in itertools.count():
        archive = new_archive(tmp_path / str(step), config())
        try:
            judge(archive, config(), Outcomes(step, failing))
        except Killed:
            judge(archive, config(), Outcomes(failing=failing))
            assert archive.digest() == unbroken.digest()
        else:
            break
    assert step > len(ABILITIES) + 4


def test_one_that_fails_on_later_questions_has_no_score(tmp_path: Path) -> None:
    archive = new_archive(tmp_path, config())
    finished = judge(archive, config(), Outcomes(failing="learning/1/1"))
    failed = archive.candidate("learning/1/1")
    assert failed is not None
    assert (failed.status, failed.failure) == ("failed", "Timeout")
    [evaluation] = archive.evaluations("candidate", "learning/1/1")
    assert evaluation.score is None
    assert evaluation.score_on_first is None
    assert "learning/1/1" not in finished


def test_with_the_race_off_all_answer_all(tmp_path: Path) -> None:
    settings = scripted_config()
    archive = new_archive(tmp_path, settings)
    assert judge(archive, settings, Outcomes()) == [c.name for c in archive.candidates()]
    assert set(questions(archive).values()) == {120}
    assert all(e.asked is None and e.score_on_first == e.score for e in archive.evaluations("candidate"))


def test_iterations_have_orders_of_their_own_and_arms_share_them(tmp_path: Path) -> None:
    archive = new_archive(tmp_path, config())
    orders = [
        Course(archive, config(), arm, t).order
        for arm, t in (("learning", 0), ("frozen", 0), ("learning", 1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_the_worst_are_taken_from_the_first_prefix(tmp_path: Path) -> None:
    archive = new_archive(tmp_path, config())
    finished = judge(archive, config(), Outcomes())
    scores = {c.name: e.score or 0.0 for c, e in ranked_new(archive, "learning")}
    first = scores_on_first(archive)
    assert set(first) == {c.name for c in archive.candidates()}
    pairs = prefer(archive.candidates(), scores, 0, config().preferences, 0, first)
    assert {pair.chosen for pair in pairs} == {max(scores, key=scores.__getitem__)}
    [rejected] = {pair.rejected for pair in pairs}
    assert first[rejected] == min(first.values())
    assert rejected not in finished


def test_a_floor_keeps_from_winning_and_from_dropping_others(tmp_path: Path) -> None:
    # All fall short of the seed, which has everything right, by more than a point on x.
    settings = config(floors={"add": 1})
    assert settings.task.floors == {"add": 1}
    strict = Objective({}, {"x": 0.01})
    assert strict.below_floor(["x", "x", "y"], [True, False, False], [True, True, True]) == {"x": 0.5}
    assert strict.below_floor(["y"], [False], [True]) == {}
    archive = new_archive(tmp_path, settings)
    course = Course(archive, settings, "learning", 0)
    course.objective = strict
    scorer = Outcomes()
    for candidate in archive.candidates():
        archive.set_screened(replace(candidate, status="new"), course.start(scorer, candidate))  # type: ignore[arg-type]
    assert len(course.finish(scorer, lambda note: None)) == len(ABILITIES)  # type: ignore[arg-type]


# --- several tasks, one score ---


def test_weights_by_hand() -> None:
    objective = Objective({"x": 3.0})
    assert objective.score(["x", "y", "y"], [True, True, False]) == pytest.approx((3 * 1 + 1 * 0.5) / 4)
    np.testing.assert_allclose(objective.shares(["x", "y", "y"]), [3 / 4, 1 / 8, 1 / 8])


def test_the_pareto_set_by_hand() -> None:
    scores = {
        "a": {"x": 0.9, "y": 0.1},
        "b": {"x": 0.5, "y": 0.5},
        "c": {"x": 0.5, "y": 0.4},  # b is better on y and as good on x
        "d": {"x": 0.9, "y": 0.1},  # equal to a, and neither beats the other
    }
    assert pareto_set(scores) == ["a", "b", "d"]
    assert pareto_set({}) == []


# --- with real merges ---


class StopInRace(Silent):
    """Ctrl-C at the third report of a race."""

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        with super().phase(name, arm, iteration) as tick:
            yield Stopping() if name == "judge" else tick


class Stopping(Tick):
    reports = 0

    def __call__(self, done: int, total: int, note: str) -> None:
        self.reports += "race on" in note
        if self.reports == 3:
            raise KeyboardInterrupt


def test_a_real_run_races_and_resumes(tmp_path: Path) -> None:
    settings = scripted_config(
        iterations=1,
        programs=5,
        race={"first": 30, "growth": 1.5, "alpha": 0.2},
        preferences={"elites": 0, "chosen_floor": 1},
        rivals=[],
        controls=[],
        scaling={},
    )

    programs = PROGRAMS[:5]
    whole = run(settings, tmp_path / "whole" / "run", factory=ScriptedFactory(programs))
    with pytest.raises(Interrupted):
        run(settings, tmp_path / "cut" / "run", factory=ScriptedFactory(programs), watch=StopInRace())
    resumed = resume(tmp_path / "cut" / "run", factory=ScriptedFactory(programs))
    assert resumed.archive.digest() == whole.archive.digest()
    asked = {e.subject: e.questions for e in whole.archive.evaluations("candidate")}
    assert min(asked.values()) < max(asked.values()) == 120
    summary = whole.summary()
    [row] = summary["iterations"]
    assert row["mean_dev"] == pytest.approx(np.mean(list(scores_on_first(whole.archive).values())))
    assert row["best_dev"] == whole.verdict["table"][1]["dev"]["score"]
    assert summary["pareto"][0]["name"] == summary["best"]["candidate"]
    seed_row, best, *_ = summary["table"]
    assert seed_row["retention"] == {}
    for group, kept in best["retention"].items():
        tasks = best["tasks"][group], seed_row["tasks"][group]
        assert kept["difference"] == pytest.approx(tasks[0]["test"] - tasks[1]["test"])
        assert kept["low"] <= kept["difference"] <= kept["high"]
    gains = [best[split]["score"] - seed_row[split]["score"] for split in ("dev", "test")]
    assert best["shrinkage"] == pytest.approx(gains[0] - gains[1])
