from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdev.algorithms.screening import PROBES, Behaviour
from selfdev.archive import Candidate, Pair
from selfdev.preferences import prefer, within_cap
from selfdev.settings import Preferences

STATUSES = ["new", "trivial", "known", "repeated", "failed"]


def candidate(
    number: int,
    status: str,
    iteration: int = 0,
    nearest: str | None = None,
    tokens: tuple[int, ...] | None = None,
) -> Candidate:
    name, tokens = f"{iteration}/{number}", (iteration, number) if tokens is None else tokens
    return Candidate(name, "learning", iteration, number, 0, "", tokens, status=status, nearest=nearest)


def test_two_texts_are_not_preferred_to_each_other() -> None:
    """Copies of both, which have names of their own: the two pairs would cancel, and KTO would know no rejected one."""
    written = [
        candidate(0, "new", tokens=(1, 2)),
        candidate(1, "new", tokens=(3, 4)),
        candidate(2, "repeated", nearest="0/0", tokens=(1, 2)),
        candidate(3, "repeated", nearest="0/1", tokens=(3, 4)),
    ]
    settings = Preferences(chosen_floor=2, copies_as_rejected=True, pairs=8)
    text = {c.name: c.tokens for c in written}
    for seed in range(8):
        pairs = prefer(written, {"0/0": 0.5, "0/1": 0.5}, 0, settings, seed)
        assert len({frozenset((text[p.chosen], text[p.rejected])) for p in pairs}) == len(pairs) == 1


@pytest.mark.parametrize(("cap", "failing"), [(0.3, 6), (0.5, 10), (0.9, 10), (1.0, 10)])
def test_a_higher_cap_on_failing_programs_takes_nothing_from_the_others(cap: float, failing: int) -> None:
    written = [candidate(i, "new") for i in range(30)] + [candidate(i, "failed") for i in range(30, 60)]
    settings = Preferences(
        chosen_floor=10, rejected_floor=20, failures_as_rejected=True, failing_cap=cap, pairs=20
    )
    pairs = prefer(written, {f"0/{i}": i / 30 for i in range(30)}, 0, settings, seed=0)
    assert Counter(p.reason for p in pairs) == {"failure": failing, "score": 20 - failing}


def test_the_papers_shares() -> None:
    written = [candidate(i, "new") for i in range(100)]
    scores = {c.name: i / 100 for i, c in enumerate(written)}
    pairs = prefer(written, scores, 0, Preferences(pairs=30), seed=0)
    assert {p.chosen for p in pairs} == {"0/99", "0/98", "0/97"}
    assert {p.rejected for p in pairs} == {f"0/{i}" for i in range(10)}
    assert len(pairs) == 30  # every pairing of 3 and 10 once


def test_elites_of_earlier_iterations_are_chosen_again() -> None:
    old = [candidate(i, "new", 0) for i in range(5)]
    now = [candidate(i, "new", 1) for i in range(5)]
    scores = {c.name: c.number / 10 for c in old + now}
    pairs = prefer(old + now, scores, 1, Preferences(elites=2), seed=0)
    assert {p.chosen for p in pairs} == {"1/4", "0/4", "0/3"}
    assert {p.rejected for p in pairs} == {"1/0"}


def test_failing_programs_are_rejected_only_if_asked_and_up_to_their_cap() -> None:
    written = [candidate(i, "new") for i in range(6)] + [candidate(i, "failed") for i in range(10, 60)]
    scores = {c.name: c.number / 10 for c in written if c.status == "new"}
    without = prefer(written, scores, 0, Preferences(chosen_floor=3, rejected_floor=3), seed=0)
    assert {p.reason for p in without} == {"score"}
    settings = Preferences(
        chosen_floor=3, rejected_floor=3, failures_as_rejected=True, pairs=10, failing_cap=0.3
    )
    reasons = [p.reason for p in prefer(written, scores, 0, settings, seed=0)]
    assert reasons.count("failure") == 3
    assert reasons.count("score") == 7


def test_an_answer_without_a_token_is_not_rejected() -> None:
    written = [candidate(0, "new"), candidate(1, "failed"), candidate(2, "failed", tokens=())]
    settings = Preferences(chosen_floor=1, failures_as_rejected=True, failing_cap=1)
    assert {p.rejected for p in prefer(written, {"0/0": 0.5}, 0, settings, seed=0)} == {"0/1"}


def test_a_cap_on_the_pairs_of_a_program_leaves_no_reason_out() -> None:
    written = [candidate(i, "new") for i in range(6)]
    written += [candidate(i, "failed" if i % 2 else "trivial") for i in range(10, 60)]
    settings = Preferences(
        chosen_floor=3,
        rejected_floor=3,
        pairs=60,
        pairs_each=4,
        failures_as_rejected=True,
        copies_as_rejected=True,
    )
    pairs = prefer(written, {f"0/{i}": i / 10 for i in range(6)}, 0, settings, seed=0)
    chosen = [p.chosen for p in pairs]
    assert {name: chosen.count(name) for name in chosen} == {"0/3": 4, "0/4": 4, "0/5": 4}
    reasons = [p.reason for p in pairs]
    assert {reason: reasons.count(reason) for reason in reasons} == {"failure": 6, "copy": 3, "score": 3}


def test_a_copy_is_not_rejected_against_what_it_copies() -> None:
    written = [candidate(0, "new"), candidate(1, "repeated", nearest="0/0")]
    settings = Preferences(copies_as_rejected=True)
    assert prefer(written, {"0/0": 0.5}, 0, settings, seed=0) == []
    other = candidate(2, "trivial")
    assert [p.rejected for p in prefer([*written, other], {"0/0": 0.5}, 0, settings, seed=0)] == ["0/2"]


def test_a_program_is_not_rejected_against_one_that_does_the_same() -> None:
    """Whatever it is said to repeat: it may be of one program's form, and behave as another."""
    entries = sum(probe.task_vectors[0].numel() for probe in PROBES)
    numbers = torch.linspace(1.0, 2.0, entries)
    behaviours = [numbers, numbers.flip(0), numbers.flip(0) + 1e-4 * numbers]
    written = [candidate(0, "new"), candidate(1, "new"), candidate(2, "repeated", nearest="0/0")]
    written = [
        replace(c, behaviour=Behaviour(each.double()).to_bytes())
        for c, each in zip(written, behaviours, strict=True)
    ]
    settings = Preferences(chosen_floor=2, copies_as_rejected=True, pairs=8)
    pairs = prefer(written, {"0/0": 0.5, "0/1": 0.5}, 0, settings, seed=0)
    assert pairs == []
    apart = [*written[:2], replace(written[2], behaviour=Behaviour(numbers.sqrt().double()).to_bytes())]
    assert prefer(apart, {"0/0": 0.5, "0/1": 0.5}, 0, settings, seed=0) == [Pair("0/1", "0/2", "copy")]


def test_chosen_are_only_those_surely_better_than_the_seed() -> None:
    written = [candidate(i, "new") for i in range(4)] + [candidate(9, "failed")]
    scores = {f"0/{i}": i / 10 for i in range(4)}
    sure = {("0/3", None), ("0/2", None), ("0/3", "0/0")}
    settings = Preferences(chosen_floor=4, rejected_floor=4, failures_as_rejected=True)
    pairs = prefer(written, scores, 0, settings, seed=0, better=lambda *pair: pair in sure)
    # 0/2 beats the seed and nobody else for sure; a failure needs no evidence.
    # Of the two only one stands against a failure: half of the pairs, and no more.
    assert {(p.chosen, p.rejected) for p in pairs} == {("0/3", "0/0"), ("0/2", "0/9")}


def test_failing_programs_take_no_place_that_the_cap_then_takes_from_them() -> None:
    """The only one to choose may stand in two pairs; what repeats it finds no partner, and one surely worse does."""
    written = [candidate(0, "new"), candidate(1, "new"), candidate(2, "repeated", nearest="0/0")]
    written += [candidate(i, "failed") for i in range(3, 8)]
    settings = Preferences(
        chosen_floor=1, failures_as_rejected=True, copies_as_rejected=True, pairs=8, pairs_each=2
    )
    for seed in range(4):
        pairs = prefer(written, {"0/0": 0.9, "0/1": 0.1}, 0, settings, seed)
        assert sorted(p.reason for p in pairs) == ["failure", "score"]


def test_an_elite_too_must_be_better_than_the_seed() -> None:
    old, now = [candidate(0, "new", 0)], [candidate(0, "new", 1), candidate(1, "failed", 1)]
    settings = Preferences(failures_as_rejected=True, failing_cap=1)
    scores = {"0/0": 0.5, "1/0": 0.4}
    pairs = prefer(old + now, scores, 1, settings, seed=0, better=lambda name, other: name == "1/0")
    assert [p.chosen for p in pairs] == ["1/0"]


def test_variations_on_one_text_share_its_pairs() -> None:
    tokens = [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (7, 8, 9, 7, 8)]
    written = [candidate(i, "new", tokens=each) for i, each in enumerate(tokens)]
    written += [candidate(i, "failed") for i in range(10, 30)]
    scores = {f"0/{i}": 0.5 for i in range(3)}
    settings = Preferences(chosen_floor=3, failures_as_rejected=True, failing_cap=1, pairs_each=4, alike=0.75)
    chosen = [p.chosen for p in prefer(written, scores, 0, settings, seed=0)]
    # The first two share 4 of 5 tokens, a ratio of 0.8.
    assert (chosen.count("0/0") + chosen.count("0/1"), chosen.count("0/2")) == (4, 4)


def test_what_fails_is_rejected_class_by_class_in_turn() -> None:
    best = candidate(0, "new")
    failing = [replace(candidate(i, "failed"), failure="SyntaxError") for i in range(10, 50)]
    failing += [replace(candidate(i, "failed"), failure="NameError") for i in range(50, 53)]
    failing += [replace(candidate(i, "failed"), failure="Timeout") for i in range(53, 55)]
    settings = Preferences(pairs=8, failures_as_rejected=True, failing_cap=1.0)
    pairs = prefer([best, *failing], {best.name: 0.5}, 0, settings, seed=0)
    named = {c.name: c.failure for c in failing}
    rejected = Counter(named[pair.rejected] for pair in pairs)
    assert rejected == {"SyntaxError": 3, "NameError": 3, "Timeout": 2}


def test_variations_on_one_failing_text_wait_for_the_others() -> None:
    best = candidate(0, "new")
    common = tuple(range(20))
    same = [candidate(i, "failed", tokens=(*common, i)) for i in range(10, 40)]
    others = [candidate(i, "failed", tokens=tuple(range(100 * i, 100 * i + 20))) for i in range(40, 43)]
    settings = Preferences(pairs=4, failures_as_rejected=True, failing_cap=1.0, alike=0.9)
    pairs = prefer([best, *same, *others], {best.name: 0.5}, 0, settings, seed=0)
    assert {c.name for c in others} < {pair.rejected for pair in pairs}
    assert len(pairs) == 4


def test_programs_that_answered_everything_are_compared_in_that() -> None:
    """In a race: the elite leads on all questions, whatever the first few said, and who left early has these alone."""
    written = [candidate(0, "new"), candidate(0, "new", 1), candidate(1, "new", 1), candidate(2, "new", 1)]
    scores = {"0/0": 0.50, "1/0": 0.60, "1/1": 0.55}  # 1/2 left early
    first = {"0/0": 0.40, "1/0": 0.70, "1/1": 0.30, "1/2": 0.45}
    settings = Preferences(chosen_floor=1, rejected_floor=2, elites=1, pairs=8, pairs_each=8)
    pairs = {(p.chosen, p.rejected) for p in prefer(written, scores, 1, settings, seed=0, first=first)}
    assert pairs == {("1/0", "1/1"), ("1/0", "1/2"), ("0/0", "1/2")}


def test_a_tie_is_no_preference() -> None:
    written = [candidate(i, "new") for i in range(4)]
    assert prefer(written, {c.name: 0.5 for c in written}, 0, Preferences(rejected_floor=3), seed=0) == []


def test_nobody_to_choose_makes_no_pairs() -> None:
    written = [candidate(0, "trivial"), candidate(1, "failed")]
    assert (
        prefer(written, {}, 0, Preferences(failures_as_rejected=True, copies_as_rejected=True), seed=0) == []
    )


@given(
    st.lists(st.tuples(st.sampled_from(STATUSES), st.floats(0, 1)), max_size=30),
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_only_new_programs_are_chosen_and_no_pair_comes_twice(
    drawn: list[tuple[str, float]], count: int, cap: float, seed: int
) -> None:
    written = [candidate(i, status) for i, (status, _) in enumerate(drawn)]
    # A trivial program may have been scored as well, and be the best of all.
    scores = {f"0/{i}": score + (status != "new") for i, (status, score) in enumerate(drawn)}
    settings = Preferences(
        pairs=count,
        failing_cap=cap,
        failures_as_rejected=True,
        copies_as_rejected=True,
        chosen_floor=4,
        rejected_floor=2,
    )
    pairs = prefer(written, scores, 0, settings, seed)
    assert len(pairs) <= count
    assert len({(p.chosen, p.rejected) for p in pairs}) == len(pairs)
    status = {c.name: c.status for c in written}
    assert all(status[p.chosen] == "new" and p.chosen != p.rejected for p in pairs)
    assert sum(p.reason == "failure" for p in pairs) <= cap * len(pairs)


def test_the_cap_holds_for_the_pairs_that_are_made() -> None:
    pairs = [Pair("a", f"f{i}", "failure") for i in range(4)] + [
        Pair("a", "s", "score"),
        Pair("m", "f9", "repair"),
    ]
    assert [p.rejected for p in within_cap(pairs, 0.5)] == ["f0", "s"]
    # Of five pairs with two others three may fail at 60 %.
    assert [p.rejected for p in within_cap([*pairs, Pair("b", "c", "copy")], 0.6)] == [
        "f0",
        "f1",
        "f2",
        "s",
        "c",
    ]
    assert within_cap(pairs, 1.0) == pairs
    assert within_cap(pairs[:4], 0.5) == []
