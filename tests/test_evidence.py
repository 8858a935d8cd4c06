"""What speaks for one program against another.

By hand: with c questions that only the better one answers and none the other way round, the e-value is
(2^(c+1) - 1) / (c + 1): 18.1 for 6 questions, 31.9 for 7.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripted import scripted_config
from selfdev.archive import FACTOR, Archive, Candidate, Evaluation, Iteration
from selfdev.archive import Run as Record
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.standing import NORMED

QUESTIONS = 12


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    config = scripted_config().model_dump(mode="json")
    with Archive.create(
        tmp_path / "archive.db", Record("r", "p", 1, "running", config, {}, "2026-01-01T00:00:00+00:00")
    ) as archive:
        archive.set_questions("development", [(str(i), "add") for i in range(QUESTIONS)])
        archive.add_evaluation(scored("seed", "seed", range(0)))
        written = [Candidate(str(n), "learning", 0, n, 0, "", source="s") for n in range(4)]
        archive.add_written(Iteration("learning", 0, 1.0, ("p",), 0.0), written)
        yield archive


def scored(
    kind: str, name: str, right: range, number: int = 0, asked: tuple[int, ...] | None = None
) -> Evaluation:
    positions = range(QUESTIONS) if asked is None else asked
    outcomes = tuple(float(position in right) for position in positions)
    facts = {FACTOR: 3.0} if kind == "scaled" else {}
    score = sum(outcomes) / len(outcomes)
    return Evaluation(kind, name, number, "development", outcomes, score, len(outcomes), facts, asked=asked)


def test_what_breaks_a_floor_is_better_than_nobody(tmp_path: Path) -> None:
    config = scripted_config(task={"name": "nano", "development": 120, "test": 240, "floors": {"rev": 10.0}})
    record = Record("r", "p", 1, "running", config.model_dump(mode="json"), {}, "2026-01-01T00:00:00+00:00")
    with Archive.create(tmp_path / "floors.db", record) as archive:
        archive.set_questions("development", [(str(i), "add" if i < 8 else "rev") for i in range(QUESTIONS)])
        archive.add_evaluation(scored("seed", "seed", range(8, 12)))
        written = [Candidate(str(n), "learning", 0, n, 0, "", source="s") for n in range(2)]
        archive.add_written(Iteration("learning", 0, 1.0, ("p",), 0.0), written)
        # Both gain eight questions of the one group; the first loses half of the other, 50 points for 10.
        archive.add_evaluation(scored("candidate", "0", range(10)))
        archive.add_evaluation(scored("candidate", "1", range(12)))
        evidence = Evidence(archive, 2.0)
        assert not evidence.better("0")
        assert evidence.better("1")
        # Where no evidence is asked for, floors bind too, and who answered nothing is nobody's better.
        unasked = Evidence(archive, 0.0)
        assert [unasked.better(name) for name in ("0", "1", "2")] == [False, True, False]
        # At another scale it keeps the floor.
        archive.add_evaluation(scored("scaled", "0", range(12), number=NORMED))
        assert Evidence(archive, 2.0).better("0")


def test_a_program_is_better_from_the_threshold_on(archive: Archive) -> None:
    archive.add_evaluation(scored("candidate", "0", range(6)))
    archive.add_evaluation(scored("candidate", "1", range(7)))
    evidence = Evidence(archive)
    assert (evidence.better("0"), evidence.better("1")) == (False, True)
    assert Evidence(archive, 18.0).better("0")
    assert not Evidence(archive, 32.0).better("1")
    assert not evidence.better("1", "0")
    assert not evidence.better("1", "1")


def test_without_a_threshold_anybody_is(archive: Archive) -> None:
    archive.add_evaluation(scored("candidate", "0", range(0)))
    assert Evidence(archive, 0).better("0")


def test_the_better_one_of_two_scales_counts_and_what_was_tuned_later_does_not(archive: Archive) -> None:
    archive.add_evaluation(scored("candidate", "0", range(3)))
    archive.add_evaluation(scored("scaled", "0", range(12), NORMED + 1))
    assert not Evidence(archive).better("0")
    archive.add_evaluation(scored("scaled", "0", range(8), NORMED))
    assert Evidence(archive).better("0")


def test_of_two_races_only_the_common_questions_count(archive: Archive) -> None:
    archive.add_evaluation(scored("candidate", "0", range(7), asked=tuple(range(6))))
    assert not Evidence(archive).better("0")  # six questions, all right: 18.1
    archive.add_evaluation(scored("candidate", "1", range(12)))
    archive.add_evaluation(scored("candidate", "2", range(0), asked=(11, 10, 9, 8, 7, 6, 5)))
    assert Evidence(archive).better("1", "2")
    assert not Evidence(archive).better("0", "2")  # position 5 alone is common


def test_a_program_that_was_never_scored_is_better_than_nobody(archive: Archive) -> None:
    archive.add_evaluation(scored("candidate", "1", range(12)))
    evidence = Evidence(archive)
    assert not evidence.better("3")
    assert not evidence.better("1", "3")


def test_the_doubt_in_a_pair_by_hand(archive: Archive) -> None:
    """2 of 12 differences are 1: mean 1/6, variance of the mean 0.1515 / 12, so 1.483 standard errors."""
    for name, right in (("0", range(8)), ("1", range(6)), ("2", range(6))):
        archive.add_evaluation(scored("candidate", name, right))
    doubt = Evidence(archive).doubt
    assert doubt("0", "1") == pytest.approx(0.0690, abs=1e-4)
    assert doubt("1", "0") == pytest.approx(1 - 0.0690, abs=1e-4)
    assert doubt("1", "2") == 0.5
    assert doubt("0", "3") == 0  # it failed
