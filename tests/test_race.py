"""Races: e-values worked by hand, who leaves, and the error rate that is promised."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdev.evaluation.race import Race, leaving, log_e_matrix, log_e_value, prefixes, question_order


def e_value(only_i: int, only_j: int) -> float:
    return float(np.exp(log_e_value(np.array(only_i), np.array(only_j))))


def exact(b: int, c: int) -> Fraction:
    """2 * integral from 0 to 1/2 of (2p)^b (2(1-p))^c dp = integral from 0 to 1 of u^b (2-u)^c du, expanded."""
    return sum(
        (math.comb(c, k) * (-1) ** k * Fraction(2) ** (c - k) / (b + k + 1) for k in range(c + 1)),
        Fraction(0),
    )


# --- e-values ---


@pytest.mark.parametrize(
    ("only_i", "only_j", "value"),
    [
        (0, 0, 1.0),  # nothing to tell them apart
        (0, 1, 1.5),  # 4 B(1, 2) I(1, 2) = 4 * 1/2 * 3/4
        (1, 0, 0.5),  # 4 B(2, 1) I(2, 1) = 4 * 1/2 * 1/4
        (1, 1, 2 / 3),  # 8 B(2, 2) I(2, 2) = 8 * 1/6 * 1/2
        (0, 7, 255 / 8),  # (2^8 - 1) / 8: seven in a row are enough for 20
        (3, 1, 0.3),  # integral of u^3 (2 - u) du = 2/4 - 1/5
    ],
)
def test_e_values_by_hand(only_i: int, only_j: int, value: float) -> None:
    assert e_value(only_i, only_j) == pytest.approx(value)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_e_values_are_the_integral_and_a_fair_bet(b: int, c: int) -> None:
    assert e_value(b, c) == pytest.approx(float(exact(b, c)), rel=1e-9)
    # Whichever of two equal models the next question favours, the e-value is on average what it was.
    assert e_value(b, c) == pytest.approx((e_value(b + 1, c) + e_value(b, c + 1)) / 2)


def test_thousands_of_questions_neither_overflow_nor_become_nan() -> None:
    counts = np.array([0, 1, 10, 4000, 9000])
    logs = log_e_value(counts[:, None], counts[None, :])
    assert not np.isnan(logs).any()
    assert logs[0, 4] == pytest.approx(9001 * math.log(2) - math.log(9001))  # (2^9001 - 1) / 9001
    assert logs[4, 0] < math.log(1 / 1000)
    assert logs.max() == logs[0, 4]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 150), st.integers(0, 99))
def test_bets_on_right_or_wrong_answers_need_their_counts_alone(
    entrants: int, questions: int, seed: int
) -> None:
    right = np.random.default_rng(seed).random((entrants, questions)) < 0.6
    np.testing.assert_allclose(log_e_matrix(right.astype(float)), log_e_matrix(right), atol=1e-9)
    np.testing.assert_allclose(log_e_matrix(right, np.full(questions, 3.0)), log_e_matrix(right))
    weights = np.random.default_rng(seed).choice([0.5, 1.0, 2.0], size=questions)
    np.testing.assert_allclose(
        log_e_matrix(right, weights), log_e_matrix(right.astype(float), weights), atol=1e-9
    )


def test_bets_by_hand_on_graded_and_weighted_questions() -> None:
    scores = np.array([[0.0, 0.5], [1.0, 0.0]])
    # Mean over l in (0, 1) of (1 + l)(1 - l / 2) = 1 + 1/4 - 1/6; the other way (1 - l)(1 + l / 2) = 1 - 1/4 - 1/6.
    np.testing.assert_allclose(np.exp(log_e_matrix(scores)), [[0, 13 / 12], [7 / 12, 0]])
    # The second question counts twice the first: (1 + l / 2)(1 - l / 2) = 1 - l^2 / 4, whose mean is 11/12.
    weighted = np.exp(log_e_matrix(scores, np.array([1.0, 2.0])))
    assert weighted[0, 1] == pytest.approx(11 / 12)


def test_nats_are_bet_on_as_they_are_averaged() -> None:
    """Nats a token, shrunk to 0..1: the mean keeps its order, which the mean of probabilities does not."""
    nats = np.array([[-1.0, -1.0], [-0.1, -2.5]])  # means -1 and -1.3; probabilities 0.37 and 0.49
    assert np.allclose(log_e_matrix(nats), log_e_matrix(np.array([[0.9, 0.9], [0.99, 0.75]])))
    found = log_e_matrix(np.repeat(nats, 200, axis=1))
    assert found[1, 0] > 0 > found[0, 1]
    # What lies below a blind guess counts as one.
    assert np.allclose(log_e_matrix(np.array([[-10.0], [-1.0]])), log_e_matrix(np.array([[-40.0], [-1.0]])))


@pytest.mark.parametrize(
    ("scores", "weights", "says"),
    [
        ([[0.0], [1.5]], None, "0..1"),
        ([[math.nan], [0.5]], None, "0..1"),
        ([[0.0, 1.0], [1.0, 0.0]], [0.0, 1.0], "above 0"),
    ],
)
def test_scores_and_weights_out_of_range_are_refused(
    scores: list[list[float]], weights: list[float] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        log_e_matrix(np.array(scores), None if weights is None else np.array(weights))


# --- who leaves ---


def test_the_mean_of_the_smallest_decides() -> None:
    e = np.array([[0, 30, 8, 1], [1, 0, 1, 1], [1, 1, 0, 1], [80, 80, 80, 0]], dtype=float)
    with np.errstate(divide="ignore"):
        log_e = np.log(e)
    # keep 1: the three others' mean. Row 0: 39 / 3 = 13; row 3: 80.
    assert leaving(log_e, 1, 1 / 20).tolist() == [False, False, False, True]
    assert leaving(log_e, 1, 1 / 12.9).tolist() == [True, False, False, True]
    # keep 2: the two smallest. Row 0: (1 + 8) / 2 = 4.5.
    assert leaving(log_e, 2, 1 / 12.9).tolist() == [False, False, False, True]
    assert leaving(log_e, 2, 1 / 4.4).tolist() == [True, False, False, True]
    assert not leaving(log_e, 4, 0.5).any()


def test_the_e_values_of_one_that_left_stand() -> None:
    race = Race(3, keep=1, alpha=0.05)
    right = np.ones((3, 18), dtype=bool)
    right[2] = False
    right[0, 10:] = False
    assert race.look(right[:, :10]) == [2]  # 10 to 0 against both: (2^11 - 1) / 11 = 186
    # Entrant 0 now loses to 1. Against 2 its e-value stays at 1 / 11, as it was after 10 questions.
    assert race.look(right[:2, :17]) == []  # (255 / 8 + 1 / 11) / 2 = 16
    assert race.look(right[:2]) == [0]  # (511 / 9 + 1 / 11) / 2 = 28


def test_at_least_keep_stay_and_the_rest_of_a_hopeless_field_leaves() -> None:
    right = np.zeros((6, 60), dtype=bool)
    right[:2] = True
    race = Race(6, keep=2, alpha=0.05)
    assert race.look(right) == [2, 3, 4, 5]
    assert race.active.tolist() == [True, True, False, False, False, False]
    assert race.look(right[:2]) == []


def test_who_may_not_win_drops_nobody() -> None:
    right = np.zeros((3, 60), dtype=bool)
    right[0] = True
    race = Race(3, keep=1, alpha=0.05)
    assert race.look(right, eligible=np.array([False, True, True])) == []
    assert race.look(right, eligible=np.array([True, True, True])) == [1, 2]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 999), st.booleans())
def test_whoever_races_keep_stay_and_the_order_of_entrants_is_nothing(
    entrants: int, keep: int, seed: int, graded: bool
) -> None:
    rng = np.random.default_rng(seed)
    ability = rng.random((entrants, 1))
    scores = rng.random((entrants, 120)) < ability
    if graded:
        scores = np.clip(rng.normal(ability, 0.1, (entrants, 120)), 0, 1)
    shuffled = rng.permutation(entrants)
    one, other = Race(entrants, keep, 0.2), Race(entrants, keep, 0.2)
    for size in (20, 60, 120):
        one.look(scores[one.active, :size])
        other.look(scores[shuffled][other.active, :size])
        assert one.active.sum() >= min(keep, entrants)
        assert one.active[shuffled].tolist() == other.active.tolist()


def test_one_of_equal_entrants_leaves_at_most_at_alpha() -> None:
    alpha, races, entrants = 0.1, 200, 6
    rng, left = np.random.default_rng(0), 0
    for _ in range(races):
        right = rng.random((entrants, 240)) < rng.random(240)  # hard and easy questions
        race = Race(entrants, keep=1, alpha=alpha)
        for size in range(20, 241, 20):
            race.look(right[race.active, :size])
        left += int((~race.active).sum())
    # Entrants of one race depend on each other, so the standard error is that of the races: about 0.006.
    assert 0 < left / (races * entrants) < alpha


# --- the questions ---


GROUPS = st.lists(st.sampled_from("abc"), min_size=1, max_size=60)


@settings(deadline=None)
@given(GROUPS, st.integers(0, 9))
def test_an_order_is_a_permutation_that_spreads_the_groups(groups: list[str], seed: int) -> None:
    order = question_order(groups, seed)
    assert sorted(order) == list(range(len(groups)))
    assert order == question_order(groups, seed)
    total = Counter(groups)
    for size in range(len(groups) + 1):
        seen = Counter(groups[i] for i in order[:size])
        for group, count in total.items():
            assert abs(seen[group] - size * count / len(groups)) <= len(total)


def test_equal_groups_take_turns_and_another_seed_is_another_order() -> None:
    groups = ["x"] * 20 + ["y"] * 20
    order = question_order(groups, 1)
    assert [groups[i] for i in order] == ["x", "y"] * 20
    assert order != question_order(groups, 2)


def test_prefixes_are_whole_rounds_and_end_with_all() -> None:
    assert prefixes(["a", "b", "c"] * 34, 10, 2.0) == [12, 21, 42, 81, 102]
    assert prefixes(["a"] * 5, 1, 1.01) == [1, 2, 3, 4, 5]
    assert prefixes(["a"] * 5, 100, 2.0) == [5]


@settings(deadline=None)
@given(GROUPS, st.integers(1, 80), st.floats(1.01, 4))
def test_prefixes_are_nested(groups: list[str], first: int, growth: float) -> None:
    sizes = prefixes(groups, first, growth)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(groups)
    assert sizes[0] >= min(first, len(groups))
