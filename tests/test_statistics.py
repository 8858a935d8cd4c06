"""Intervals and p values: hand-worked numbers first, then what must hold for any outcomes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdev.evaluation.statistics import (
    Difference,
    holm,
    is_plain_share,
    mcnemar,
    paired_difference,
    permutation_test,
    score_interval,
    wilson,
)

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
SHARES = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
P_VALUES = st.lists(st.floats(0, 1), max_size=12)


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[Tensor, Tensor]:
    """Outcomes of two models with these counts of questions."""
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


def split(pairs: list[tuple[bool, bool]]) -> tuple[Tensor, Tensor]:
    a, b = zip(*pairs, strict=True)
    return torch.tensor(a), torch.tensor(b)


# --- wilson ---


def test_wilson_of_8_in_10():
    # z^2 = 3.8415; centre (0.8 + 0.19207) / 1.38415; half width 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)


def test_wilson_at_the_ends():
    # none right: low is 0 and high is z^2 / (n + z^2)
    assert wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-6)


@given(SHARES, st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_mirrors(share, level):
    right, n = share
    low, high = wilson(right, n, level)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson(n - right, n, level) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("right", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 0.0), (1, 2, 1.0)]
)
def test_wilson_refuses_what_is_no_share(right, n, level):
    with pytest.raises(ValueError, match=r".+"):
        wilson(right, n, level)


# --- paired difference ---


def test_difference_is_that_of_the_shares():
    result = paired_difference(*outcomes(both=40, only_a=15, only_b=5, neither=40))
    assert result.difference == pytest.approx(0.10)
    # The differences have variance 0.2 - 0.1^2 = 0.19, so the mean of 100 has the standard error 0.0436, and
    # the interval is near 0.10 -+ 1.96 * 0.0436. Resampled means are whole hundredths.
    assert result.low == pytest.approx(0.0146, abs=0.011)
    assert result.high == pytest.approx(0.1854, abs=0.011)


def test_pairing_narrows_the_interval():
    """The same two scores; where the models err on the same questions, their difference is better known."""
    alike = paired_difference(*outcomes(both=500, only_a=100, only_b=0, neither=400))
    apart = paired_difference(*outcomes(both=100, only_a=500, only_b=400, neither=0))
    assert alike.difference == pytest.approx(apart.difference)
    assert alike.high - alike.low < 0.5 * (apart.high - apart.low)


def test_groups_count_alike_whatever_their_size():
    easy = outcomes(both=0, only_a=10, only_b=0, neither=0)
    hard = outcomes(both=90, only_a=0, only_b=0, neither=0)
    a, b = (torch.cat(pair) for pair in zip(easy, hard, strict=True))
    groups = ["easy"] * 10 + ["hard"] * 90
    assert paired_difference(a, b).difference == pytest.approx(0.1)
    # In either group all questions have the same outcome, so drawing them anew changes nothing.
    assert paired_difference(a, b, groups) == Difference(0.5, 0.5, 0.5)


def test_groups_may_be_interleaved():
    a, b = outcomes(both=3, only_a=3, only_b=1, neither=1)
    groups = ["x", "y"] * 4
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert paired_difference(a, b, groups) == paired_difference(a[order], b[order], ["x"] * 4 + ["y"] * 4)


def test_the_seed_decides_the_interval():
    a, b = outcomes(both=300, only_a=80, only_b=60, neither=60)
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert len({paired_difference(a, b, seed=seed).low for seed in range(20)}) > 1


def test_drawing_leaves_the_global_streams_alone():
    before = torch.get_rng_state()
    paired_difference(*outcomes(4, 3, 2, 1))
    assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None)
@given(OUTCOMES, st.floats(0.5, 0.99))
def test_interval_holds_the_difference_of_many_and_widens_with_the_level(pairs, level):
    a, b = split(pairs)
    narrow, wide = paired_difference(a, b, level=level), paired_difference(a, b, level=0.999)
    assert narrow.difference == pytest.approx(a.float().mean().item() - b.float().mean().item(), abs=1e-6)
    assert -1 <= wide.low <= narrow.low <= narrow.high <= wide.high <= 1
    assert wide.low <= narrow.difference + 1e-9
    assert wide.high >= narrow.difference - 1e-9


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for number in range(400):
        draw = torch.rand(200, generator=generator)  # a true difference of 0.2 - 0.1
        result = paired_difference(draw < 0.2, (draw >= 0.2) & (draw < 0.3), seed=number)
        held += result.low <= 0.1 <= result.high
    # 380 expected, with a standard deviation of 4.4
    assert 364 <= held <= 396


@pytest.mark.parametrize("statistic", [paired_difference, mcnemar, permutation_test])
@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.tensor([True]), torch.tensor([True, False]), "shapes"),
        (torch.tensor([], dtype=torch.bool), torch.tensor([], dtype=torch.bool), "at least one"),
        (torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool), "shapes"),
        (torch.tensor([1.0]), torch.tensor([True]), "bool"),
    ],
)
def test_outcomes_that_are_no_pair_are_refused(statistic, a, b, reason):
    with pytest.raises(ValueError, match=reason):
        statistic(a, b)


def test_groups_and_level_are_checked():
    a, b = outcomes(1, 1, 1, 1)
    with pytest.raises(ValueError, match="3 groups for 4 questions"):
        paired_difference(a, b, groups=["x"] * 3)
    with pytest.raises(ValueError, match="level 95"):
        paired_difference(a, b, level=95)


# --- mcnemar ---


def test_mcnemar_counts_the_discordant_questions():
    # 1 against 9: twice the probability of at most 1 head in 10, 2 * (1 + 10) / 1024
    assert mcnemar(*outcomes(both=50, only_a=9, only_b=1, neither=3)) == pytest.approx(22 / 1024)
    # Agreement says nothing.
    assert mcnemar(*outcomes(both=0, only_a=9, only_b=1, neither=0)) == pytest.approx(22 / 1024)
    # 5 against 0: 2 / 32
    assert mcnemar(*outcomes(both=0, only_a=0, only_b=5, neither=7)) == pytest.approx(2 / 32)


def test_mcnemar_without_a_difference():
    assert mcnemar(*outcomes(both=3, only_a=0, only_b=0, neither=4)) == 1
    assert mcnemar(*outcomes(both=0, only_a=6, only_b=6, neither=0)) == 1


@given(OUTCOMES)
def test_mcnemar_is_symmetric(pairs):
    a, b = split(pairs)
    assert 0 < mcnemar(a, b) <= 1
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))


# --- weights, and outcomes that are graded ---


def test_groups_weigh_as_they_are_told():
    easy = outcomes(both=0, only_a=10, only_b=0, neither=0)
    hard = outcomes(both=90, only_a=0, only_b=0, neither=0)
    a, b = (torch.cat(pair) for pair in zip(easy, hard, strict=True))
    groups = ["easy"] * 10 + ["hard"] * 90
    assert paired_difference(a, b, groups, weights={"easy": 3.0}) == Difference(0.75, 0.75, 0.75)
    assert score_interval(b, groups, weights={"easy": 3.0}) == (0.25, 0.25)


def test_graded_differences_have_the_interval_of_their_mean():
    a, b = torch.arange(400, dtype=torch.float64) / 400, torch.zeros(400, dtype=torch.float64)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(0.49875)
    # Even numbers in 0..1 have the standard deviation 0.2887: 1.96 * 0.2887 / 20 = 0.0283.
    assert (result.low, result.high) == pytest.approx((0.4705, 0.5270), abs=0.003)
    assert score_interval(a) == (result.low, result.high)


def test_a_plain_share_has_wilsons_interval_and_a_weighted_one_its_own():
    a, _ = outcomes(both=6, only_a=2, only_b=0, neither=2)
    assert score_interval(a) == wilson(8, 10)
    assert score_interval(a, ["x", "y"] * 5) == wilson(8, 10)
    assert not is_plain_share(a, ["x"] * 4 + ["y"] * 6)
    assert not is_plain_share(a, ["x", "y"] * 5, {"x": 2.0})
    assert not is_plain_share(a.double())


def test_permutation_by_hand():
    # Differences 1, 2 and 3 tenths, all in favour: of 8 sign patterns 2 are as extreme. The draw is of 20,000.
    a = torch.tensor([0.1, 0.2, 0.3])
    assert permutation_test(a, torch.zeros(3)) == pytest.approx(0.25, abs=0.01)
    # 0.1 + 0.2 - 0.3 = 0: every pattern is as extreme.
    assert permutation_test(torch.tensor([0.1, 0.2, 0.0]), torch.tensor([0.0, 0.0, 0.3])) == pytest.approx(
        1.0
    )
    # Two groups, one question each, both in favour; with weights 3 and 1 the statistic is 1 in 2 of 4 patterns.
    right, wrong = torch.tensor([True, True]), torch.tensor([False, False])
    p = permutation_test(right, wrong, ["x", "y"], weights={"x": 3.0})
    assert p == pytest.approx(0.5, abs=0.015)


def test_permutation_of_plain_shares_is_mcnemar():
    a, b = outcomes(both=50, only_a=20, only_b=8, neither=22)
    assert permutation_test(a, b) == pytest.approx(mcnemar(a, b), abs=0.004)
    assert permutation_test(a, b) == permutation_test(b, a, seed=0)
    assert permutation_test(a, a) == 1


def test_a_weighted_test_sees_what_counts():
    """One model wins the heavy group and the other the light one; unweighted there is no difference."""
    heavy, light = outcomes(0, 12, 0, 30), outcomes(0, 0, 12, 30)
    a, b = (torch.cat(pair) for pair in zip(heavy, light, strict=True))
    groups = ["heavy"] * 42 + ["light"] * 42
    assert permutation_test(a, b, groups) == pytest.approx(1, abs=0.01)
    assert permutation_test(a, b, groups, weights={"heavy": 10.0}) < 0.01


@settings(deadline=None, max_examples=25)
@given(OUTCOMES, st.integers(0, 5))
def test_a_permutation_p_is_a_probability_above_zero(pairs, seed):
    a, b = split(pairs)
    assert 0 < permutation_test(a, b, [i % 2 for i in range(len(a))], seed, {0: 2.0}) <= 1


# --- holm ---


def test_holm_by_hand():
    # sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1; none below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_raises_values_at_most_as_bonferroni_and_keeps_their_order(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


@given(P_VALUES.flatmap(lambda p: st.tuples(st.just(p), st.permutations(range(len(p))))))
def test_holm_does_not_depend_on_the_order(case):
    p_values, order = case
    adjusted = holm(p_values)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="no p value"):
        holm([0.5, p])


# --- families


def test_questions_of_one_family_count_once():
    """Five sums, each asked in four ways, that one model has right and the other wrong: 2 / 2^5, not 2 / 2^20."""
    a, b = outcomes(both=0, only_a=20, only_b=0, neither=0)
    families = [number // 4 for number in range(20)]
    assert mcnemar(a, b) == pytest.approx(2 / 2**20)
    assert permutation_test(a, b, families=families) == pytest.approx(2 / 2**5, abs=0.005)
    assert is_plain_share(a)
    assert not is_plain_share(a, families=families)


def test_a_drawn_family_brings_all_its_questions():
    # Of a family of three that gained and one of a single question that did not, two are drawn: 3/3, 3/4 twice, 0/1.
    a, b = outcomes(both=0, only_a=3, only_b=0, neither=1)
    found = paired_difference(a, b, families=["x", "x", "x", "y"], level=0.6)
    assert (found.difference, found.low, found.high) == (0.75, 0.0, 1.0)
    assert paired_difference(a, b, families=["x", "x", "x", "y"], level=0.4) == Difference(0.75, 0.75, 0.75)
    # A name that two groups share is two families, since groups are drawn for themselves.
    apart = paired_difference(a, b, ["g", "g", "h", "h"], families=["x", "y", "x", "y"])
    assert apart == paired_difference(a, b, ["g", "g", "h", "h"])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(0, 5))
@settings(max_examples=20)
def test_families_of_one_question_change_nothing(pairs, seed):
    a, b = split(pairs)
    families = [f"family {i}" for i in range(len(pairs))]
    assert paired_difference(a, b, seed=seed, families=families) == paired_difference(a, b, seed=seed)
    assert permutation_test(a, b, seed=seed, families=families) == permutation_test(a, b, seed=seed)
    assert score_interval(a, seed=seed, families=families) == score_interval(a, seed=seed)


def test_equal_models_are_told_apart_no_more_often_than_the_level_says():
    """Twenty families of five questions that are answered alike: by question two in five comparisons are significant."""
    stream = torch.Generator().manual_seed(0)
    families = [number // 5 for number in range(100)]
    by_family = by_question = 0
    for seed in range(150):
        a, b = (torch.randint(0, 2, (20,), generator=stream).bool().repeat_interleave(5) for _ in range(2))
        by_family += permutation_test(a, b, seed=seed, families=families) < 0.05
        by_question += mcnemar(a, b) < 0.05
    assert by_family <= 15
    assert by_question >= 40


def test_graded_answers_have_families_too():
    """Three hundred families of different sums are drawn one by one; pairs of equal questions widen as theory says."""
    gains = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twice, nothing = gains.repeat_interleave(2), torch.zeros(600, dtype=torch.float64)
    families = [number // 2 for number in range(600)]
    alone = paired_difference(gains, nothing[:300])
    together = paired_difference(twice, nothing, families=families)
    assert together.difference == pytest.approx(alone.difference)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)
    apart = paired_difference(twice, nothing)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.1)
    p, its = permutation_test(twice, nothing, families=families), permutation_test(gains, nothing[:300])
    assert p == pytest.approx(its, abs=0.02)


def test_every_question_has_its_family():
    a, b = outcomes(1, 1, 1, 1)
    with pytest.raises(ValueError, match="2 families for 4 questions"):
        paired_difference(a, b, families=["x", "y"])
