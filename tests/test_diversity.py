"""How inventive an iteration is, by hand."""

import math

import pytest

from selfdev.algorithms.screening import PROBES, Behaviour
from selfdev.archive import Candidate
from selfdev.evaluation.diversity import diversity

PROMPT = "def merge_vote(deltas):\n    pass\n"
OUTPUTS = {
    "sum": lambda v: v.sum(0),
    "tanh": lambda v: v.tanh().sum(0),
    "roll": lambda v: v.sum(0).roll(1, 0),
}


def candidate(
    number: int, status: str, nearest: str | None = None, output: str | None = None, iteration: int = 0
) -> Candidate:
    behaviour = None
    if output is not None:
        behaviour = Behaviour.of([OUTPUTS[output](probe.task_vectors) for probe in PROBES]).to_bytes()
    return Candidate(
        f"a/{iteration}/{number}",
        "a",
        iteration,
        number,
        0,
        "",
        status=status,
        nearest=nearest,
        behaviour=behaviour,
    )


def test_entropy_and_copies() -> None:
    written = [
        candidate(0, "new"),
        candidate(1, "new"),
        candidate(2, "trivial", "linear combination"),
        candidate(3, "trivial", "linear combination"),
        candidate(4, "known", "example vote"),
        candidate(5, "failed"),
    ]
    found = diversity(written, [], [PROMPT])
    # Shares 0.2, 0.2, 0.4 and 0.2 of five working programs.
    assert found.entropy == pytest.approx(0.6 * math.log(5) + 0.4 * math.log(2.5))
    assert found.copies == pytest.approx(0.2)
    assert found.distance is None
    assert diversity(written, [], ["def merge_other(deltas):\n"]).copies == 0


def test_a_repetition_is_the_behaviour_that_it_repeats() -> None:
    written = [candidate(0, "new"), candidate(1, "repeated", "a/0/0")]
    assert diversity(written, [], [PROMPT]).entropy == 0


def test_nothing_that_works_has_no_diversity() -> None:
    found = diversity([candidate(0, "failed")], [], [PROMPT])
    assert (found.entropy, found.copies, found.distance) == (0.0, 0.0, None)


def test_the_distance_is_to_the_nearest_earlier_program() -> None:
    first = [candidate(0, "new", output="sum")]
    near = diversity([candidate(0, "new", output="sum", iteration=1)], first, [PROMPT])
    assert near.distance == pytest.approx(0, abs=1e-5)
    far = diversity([candidate(0, "new", output="roll", iteration=1)], first, [PROMPT])
    assert far.distance is not None
    assert far.distance > 0.5
    # Programs of the same iteration count from the second one on; what failed or came later does not.
    both = [candidate(0, "new", output="tanh", iteration=1), candidate(1, "new", output="tanh", iteration=1)]
    alone, twice = diversity(both[:1], first, [PROMPT]), diversity(both, first, [PROMPT])
    assert twice.distance == pytest.approx(0, abs=1e-5)
    assert alone.distance is not None
    assert alone.distance > 0.01
