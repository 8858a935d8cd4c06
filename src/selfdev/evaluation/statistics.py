"""How sure one can be of a score, and of the difference between two models on the same questions."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

RESAMPLES = 5000
"""Resamples of the bootstrap: the ends of a 95 % interval then vary by about 1 % of its width."""


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


def paired_difference(
    a: Tensor,
    b: Tensor,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The score of `a` minus that of `b`, with a percentile interval of the paired bootstrap (Efron 1979).

    Questions are drawn anew, both models' outcomes together; with groups, as many in each group as there are.
    The interval says how the difference varies with the questions, not with the training of the models. It
    has no width where the models never differ, and is too narrow with fewer than about 50 questions in all.

    Args:
        a: which questions the first model answered right, bool, shape (questions,).
        b: the same of the second model, in the same order.
        groups: the group of each question. The score is the unweighted mean over the groups' shares, as in
            `scoring.aggregate`; without groups, the share of all questions.
        level: confidence level, in (0, 1).
        seed: of the drawing; the same seed gives the same interval.

    Raises:
        ValueError: no questions, outcomes or groups of different lengths, outcomes that are not bool.
    """
    _check_pair(a, b)
    _check_level(level)
    if groups is not None and len(groups) != len(a):
        raise ValueError(f"{len(groups)} groups for {len(a)} questions; give the group of each question")
    change = (a.int() - b.int()).numpy(force=True)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or [None]))}
    members = np.array([numbers[group] for group in groups]) if groups else np.zeros(len(change), dtype=int)
    by_group = [change[members == number] for number in range(len(numbers))]

    rng = np.random.default_rng(seed)
    resampled = np.mean([_resampled_means(each, rng) for each in by_group], axis=0)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(np.mean([each.mean() for each in by_group])), float(low), float(high))


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


def _resampled_means(change: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `RESAMPLES` bootstrap samples of one group's differences, shape (RESAMPLES,).

    A difference is -1, 0 or 1, and how often each is drawn follows a multinomial distribution: drawing the
    three counts is the bootstrap itself, not an approximation, and takes no time.
    """
    n = len(change)
    better, worse = np.count_nonzero(change == 1), np.count_nonzero(change == -1)
    counts = rng.multinomial(n, [better / n, worse / n, (n - better - worse) / n], size=RESAMPLES)
    means: NDArray[np.float64] = (counts[:, 0] - counts[:, 1]) / n
    return means


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.bool or b.dtype != torch.bool:
        raise ValueError(f"outcomes are {a.dtype} and {b.dtype}; whether an answer is right is a bool")
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"outcomes of shapes {tuple(a.shape)} and {tuple(b.shape)}; give both models' outcomes on the "
            "same questions, at least one, shape (questions,)"
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level} is not between 0 and 1")
