"""How inventive an iteration is, by hand."""

import math

import pytest

from selfdev.algorithms.screening import PROBES, Behaviour
from selfdev.algorithms.source import Form, wrap_short
from selfdev.archive import Candidate
from selfdev.evaluation.diversity import diversity, rarefied
from selfdev.factory.prompt import ask, showing

PROMPT = "def merge_vote(deltas):\n    pass\n"
OUTPUTS = {
    "sum": lambda v: v.sum(0),
    "tanh": lambda v: v.tanh().sum(0),
    "roll": lambda v: v.sum(0).roll(1, 0),
}


def candidate(
    number: int,
    status: str,
    nearest: str | None = None,
    output: str | None = None,
    iteration: int = 0,
    source: str | None = None,
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
        source=source,
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
    assert (found.distinct, found.rarefied) == (4, None)  # five work, and a draw is of ten
    assert diversity(written, [], ["def merge_other(deltas):\n"]).copies == 0


@pytest.mark.parametrize("form", [Form.SHORT, Form.CONTRACT])
def test_a_copy_of_an_own_program_that_the_prompt_shows_is_a_copy_of_the_prompt(form: Form) -> None:
    roll = wrap_short("def merge_roll(deltas):\n    return sum(deltas).roll(1, 0)\n")
    whole = "import torch\n\n\ndef merge_models(model_dict, device):\n    return odd(model_dict)\n"
    vote = {"vote": "def merge_vote(deltas):\n    return deltas.sign().sum(0)\n"}
    [asked] = showing([ask(["vote"], vote, form)], {"a/0/0": roll}, vote)
    [both] = showing([ask(["vote", "vote"], vote, form)], {"a/0/1": whole}, vote)
    earlier = [candidate(0, "new", source=roll), candidate(1, "new", source=whole)]
    written = [
        candidate(0, "repeated", "a/0/0", iteration=1),
        candidate(1, "repeated", "a/0/1", iteration=1),
        candidate(2, "repeated", "a/1/3", iteration=1),
        candidate(3, "new", iteration=1),
        candidate(4, "known", "example vote", iteration=1),
    ]
    assert diversity(written, earlier, [asked.text]).copies == pytest.approx(0.2)
    assert diversity(written, earlier, [both.text]).copies == pytest.approx(0.4)
    # Who is not shown it has repeated itself, and copied nothing.
    assert diversity(written, earlier, [PROMPT]).copies == pytest.approx(0.2)


def test_the_behaviours_of_a_draw_by_hand() -> None:
    # Two of three balls, two of them red: both red in one of three draws, else one of each.
    assert rarefied([2, 1], 2) == pytest.approx(1 / 3 * 1 + 2 / 3 * 2)
    assert rarefied([5], 3) == 1
    assert rarefied([1] * 7, 3) == 3
    assert rarefied([2, 1], 3) == 2
    assert rarefied([2, 1], 4) is None


def test_twice_as_many_programs_of_the_same_kinds_are_not_more_inventive() -> None:
    few = [candidate(i, "new") for i in range(5)]
    few += [candidate(i, "trivial", "linear combination") for i in range(5, 10)]
    found = diversity(few, [], [PROMPT])
    assert (found.distinct, found.rarefied) == (6, 6)
    # Ten new ones of twenty: each is in half of the draws, and a trivial one nearly always.
    many = [candidate(i, "new") for i in range(10)]
    many += [candidate(i, "trivial", "linear combination") for i in range(10, 20)]
    found = diversity(many, [], [PROMPT])
    assert found.distinct == 11
    assert found.rarefied == pytest.approx(5 + 1 - 1 / math.comb(20, 10))


def test_a_repetition_is_the_behaviour_that_it_repeats() -> None:
    written = [candidate(0, "new"), candidate(1, "repeated", "a/0/0")]
    assert diversity(written, [], [PROMPT]).entropy == 0


def test_nothing_that_works_has_no_diversity() -> None:
    found = diversity([candidate(0, "failed")], [], [PROMPT])
    assert (found.entropy, found.copies, found.distance) == (0.0, 0.0, None)
    assert (found.distinct, found.rarefied) == (0, None)


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
