"""How sure one can be of a score, and of the difference between two models on the same questions.

Questions of one *family*, such as the same sum asked in several ways, are answered alike. Taken as independent they
make intervals too narrow and p values too small; so families are what is drawn and what is flipped (clustered errors:
Miller 2024, "Adding error bars to evals", arXiv 2411.00640). Without families every question is one of its own.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

RESAMPLES = 5000
"""Resamples of the bootstrap: the ends of a 95 % interval then vary by about 1 % of its width."""

PERMUTATIONS = 20_000
"""Random changes of sign in a permutation test: its smallest p value is 1 in 20,001."""

_AT_ONCE = 2_000_000
"""Numbers drawn at once: 16 MB."""

_KINDS = 200
"""Up to so many kinds of families, how many of each kind are drawn is drawn, and not every family."""

Values = NDArray[np.float64]
Weights = Mapping[Hashable, float]


@dataclass(frozen=True)
class Difference:
    """The difference between two scores, and its confidence interval, all in -1..1."""

    difference: float
    low: float
    high: float


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927).

    Args:
        right: questions answered right, in 0..n.
        n: questions asked, at least 1.
        level: confidence level, in (0, 1).

    Returns:
        The lower and the upper end, in 0..1.

    Raises:
        ValueError: a number out of its range.
    """
    if n < 1:
        raise ValueError(f"a share of {n} questions has no interval; ask at least one")
    _check_level(level)
    interval = stats.binomtest(right, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(
    outcomes: Tensor,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    weights: Weights | None = None,
    families: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """A confidence interval for the score of one model.

    Wilson's where the score is a plain share of right answers; else, as groups weigh differently, outcomes are
    graded or questions come in families, the percentile interval of the bootstrap within the groups, which has no width
    where all outcomes of every group are equal.

    Args:
        outcomes: of the model, shape (questions,); bool, or floating-point.
        groups: see `paired_difference`.
        level: confidence level, in (0, 1).
        seed: of the drawing.
        weights: see `paired_difference`.
        families: see `paired_difference`.

    Raises:
        ValueError: see `paired_difference`.
    """
    _check_pair(outcomes, outcomes, graded=True)
    _check_level(level)
    if is_plain_share(outcomes, groups, weights, families):
        return wilson(int(outcomes.sum()), len(outcomes), level)
    found = _bootstrap(*_strata(outcomes, groups, weights, families), level, seed)
    return found.low, found.high


def paired_difference(
    a: Tensor,
    b: Tensor,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    weights: Weights | None = None,
    families: Sequence[Hashable] | None = None,
) -> Difference:
    """The score of `a` minus that of `b`, with a percentile interval of the paired bootstrap (Efron 1979).

    Families are drawn anew, all their questions and both models' outcomes together; with groups, as many in each group
    as there are. The interval says how the difference varies with the questions, not with the training of the models.
    It has no width where the models never differ, and is too narrow with fewer than about 50 families in all.

    Args:
        a: which questions the first model answered right, bool, or how well, floating-point; shape (questions,).
        b: the same of the second model, in the same order.
        groups: the group of each question. The score is the mean over the groups' mean outcomes; without groups,
            the mean of all questions.
        level: confidence level, in (0, 1).
        seed: of the drawing; the same seed gives the same interval.
        weights: of groups in the mean over them, above 0; 1 where a group is not named.
        families: the family of each question; within a group, those of one family are drawn together.

    Raises:
        ValueError: no questions, outcomes, groups or families of different lengths, bool outcomes beside graded ones.
    """
    _check_pair(a, b, graded=True)
    _check_level(level)
    return _bootstrap(*_strata(_minus(a, b), groups, weights, families), level, seed)


def permutation_test(
    a: Tensor,
    b: Tensor,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    families: Sequence[Hashable] | None = None,
) -> float:
    """Two-sided p value of "it makes no difference which of the models answers a family of questions" (Fisher 1935).

    Under the hypothesis each family's difference is as likely as its negative. The statistic is the difference of
    the scores, in which groups may weigh differently and outcomes may be graded; what is drawn are signs. The p value
    counts the drawing itself, so it is never 0 and valid at any number of draws (Phipson and Smyth 2010). Where
    outcomes are right or wrong, and all questions count alike and for themselves, this is McNemar's test, which
    `mcnemar` does exactly.

    Args:
        a: outcomes of the first model, shape (questions,).
        b: those of the second model, in the same order.
        groups: see `paired_difference`.
        seed: of the drawing.
        weights: see `paired_difference`.
        families: see `paired_difference`.

    Raises:
        ValueError: see `paired_difference`.
    """
    _check_pair(a, b, graded=True)
    strata, shares = _strata(_minus(a, b), groups, weights, families)
    rng = np.random.default_rng(seed)
    drawn = sum(share * _signed_means(each, rng) for each, share in zip(strata, shares, strict=True))
    observed = abs(sum(share * each.mean for each, share in zip(strata, shares, strict=True)))
    # Sums of the same numbers in another order may differ by a rounding.
    as_large = np.count_nonzero(np.abs(drawn) >= observed - 1e-12)
    return (1 + as_large) / (1 + PERMUTATIONS)


def is_plain_share(
    outcomes: Tensor,
    groups: Sequence[Hashable] | None = None,
    weights: Weights | None = None,
    families: Sequence[Hashable] | None = None,
) -> bool:
    """Whether the score is the share of right answers: bool, and every question counts alike and for itself."""
    strata, shares = _strata(outcomes, groups, weights, families)
    each = [share / stratum.questions for stratum, share in zip(strata, shares, strict=True)]
    alone = all(len(stratum.sums) == stratum.questions for stratum in strata)
    return outcomes.dtype == torch.bool and alone and bool(np.allclose(each, each[0], rtol=1e-9))


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Exact two-sided p value of "both models are right equally often" (McNemar 1947).

    Only questions on which the models differ say anything: under the hypothesis each is as likely to favour
    the one as the other. Where they never differ, p is 1.

    Args:
        a: which questions the first model answered right, bool, shape (questions,).
        b: the same of the second model, in the same order.

    Raises:
        ValueError: no questions, outcomes of different lengths or not bool.
    """
    _check_pair(a, b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for the number of tests, so that all together err at most at the level (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is smaller than one before it,
    nor above 1.

    Args:
        p_values: each in 0..1.

    Returns:
        The adjusted values, in the order given.

    Raises:
        ValueError: a value that is no probability.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not 0 <= p_values[i] <= 1 or math.isnan(p_values[i]):
            raise ValueError(f"{p_values[i]} is no p value; each lies in 0..1")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _minus(a: Tensor, b: Tensor) -> Tensor:
    return a.int() - b.int() if a.dtype == torch.bool else a.double() - b.double()


@dataclass(frozen=True)
class _Stratum:
    """The families of one group.

    Attributes:
        sums: of each one's values, shape (families,).
        sizes: how many questions each has, same shape.
    """

    sums: Values
    sizes: Values

    @property
    def questions(self) -> int:
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        return float(self.sums.sum()) / self.questions


def _strata(
    values: Tensor,
    groups: Sequence[Hashable] | None,
    weights: Weights | None,
    families: Sequence[Hashable] | None = None,
) -> tuple[list[_Stratum], list[float]]:
    """The families of each group, and what the group counts in the score; the sum is 1."""
    for what, given in (("groups", groups), ("families", families)):
        if given is not None and len(given) != len(values):
            raise ValueError(f"{len(given)} {what} for {len(values)} questions; give one for each question")
    its_group = _numbered(groups or [None] * len(values))
    its_family = np.arange(len(values)) if families is None else _numbered(families)
    numeric = values.double().numpy(force=True)
    strata = []
    for group in range(its_group.max() + 1):
        mine = its_group == group
        _, members = np.unique(its_family[mine], return_inverse=True)
        sums, sizes = np.bincount(members, numeric[mine]), np.bincount(members)
        strata.append(_Stratum(sums.astype(np.float64), sizes.astype(np.float64)))
    shares = [(weights or {}).get(group, 1.0) for group in dict.fromkeys(groups or [None])]
    return strata, [share / sum(shares) for share in shares]


def _numbered(given: Sequence[Hashable]) -> NDArray[np.int64]:
    """The same in numbers from 0, in the order of their first."""
    numbers = {each: number for number, each in enumerate(dict.fromkeys(given))}
    return np.array([numbers[each] for each in given])


def _bootstrap(strata: list[_Stratum], shares: list[float], level: float, seed: int) -> Difference:
    rng = np.random.default_rng(seed)
    resampled = np.average([_resampled_means(each, rng) for each in strata], axis=0, weights=shares)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.average([each.mean for each in strata], weights=shares))
    return Difference(mean, float(low), float(high))


def _resampled_means(stratum: _Stratum, rng: np.random.Generator) -> Values:
    """Means of `RESAMPLES` bootstrap samples of one group's families, shape (RESAMPLES,).

    How often families of each kind, of one sum and one size, are drawn follows a multinomial distribution: where there
    are few kinds, drawing their counts is the bootstrap itself, not an approximation, and takes no time.
    """
    n = len(stratum.sums)
    kinds, counts = np.unique([stratum.sums, stratum.sizes], axis=1, return_counts=True)
    if len(counts) <= _KINDS:
        drawn = rng.multinomial(n, counts / n, size=RESAMPLES)
        means: Values = (drawn @ kinds[0]) / (drawn @ kinds[1])
        return means
    rows = max(1, _AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    places = (rng.integers(n, size=(size, n)) for size in sizes)
    return np.concatenate([stratum.sums[each].sum(1) / stratum.sizes[each].sum(1) for each in places])


def _signed_means(stratum: _Stratum, rng: np.random.Generator) -> Values:
    """Means of one group's values where each family has a random sign, shape (PERMUTATIONS,)."""
    differing = np.abs(stratum.sums[stratum.sums != 0])
    kinds, counts = np.unique(differing, return_counts=True)
    if len(kinds) <= _KINDS:
        heads = [rng.binomial(count, 0.5, size=PERMUTATIONS) for count in counts]
        means: Values = sum(
            (kind * (2 * each - count) for kind, each, count in zip(kinds, heads, counts, strict=True)),
            np.zeros(PERMUTATIONS),
        )
        return means / stratum.questions
    rows = max(1, _AT_ONCE // len(differing))
    sizes = [min(rows, PERMUTATIONS - start) for start in range(0, PERMUTATIONS, rows)]
    signs = (2 * rng.integers(2, size=(size, len(differing))) - 1 for size in sizes)
    return np.concatenate([each @ differing for each in signs]) / stratum.questions


def _check_pair(a: Tensor, b: Tensor, *, graded: bool = False) -> None:
    fits = a.dtype == b.dtype and (a.dtype == torch.bool or (graded and a.dtype.is_floating_point))
    if not fits:
        raise ValueError(
            f"outcomes are {a.dtype} and {b.dtype}; whether an answer is right is a bool"
            + ("; graded outcomes are both floating-point" if graded else "")
        )
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"outcomes of shapes {tuple(a.shape)} and {tuple(b.shape)}; give both models' outcomes on the "
            "same questions, at least one, shape (questions,)"
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level} is not between 0 and 1")
