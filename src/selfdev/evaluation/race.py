"""Races: candidates meet the same questions in one order, and whoever is surely not among the best leaves early.

Candidates i and j have answered the same questions; b of them only i has right, c only j. The e-value

    E_ij = 2^(b+c+1) B(b+1, c+1) I_1/2(b+1, c+1)

bets against "i is no worse than j": it is the likelihood of b and c where only i is right with a probability p below
1/2, averaged over all such p, against p = 1/2 (a mixture as in Robbins 1970; Ramdas et al. 2023, arXiv 2210.01948).
With N entrants of which `keep` are to be found, i leaves when the mean of its N - keep smallest E_ij reaches 1/alpha.

What is guaranteed. An entrant that belongs to the best `keep` is no worse than at least N - keep of the others. The
mean of its e-values against these is an e-process, and the N - keep smallest have no larger mean: by Ville's
inequality such an entrant ever leaves with a probability of at most alpha, however often one looks. That is for one
entrant in one iteration, and for questions drawn afresh. Where an iteration reuses questions that have chosen what was
learned from, it is conditional on what they said before. Groups that take turns keep it, as long as one looks after
whole rounds: in a round each bet's mean is at most (1 + bet * mean difference)^groups, by the inequality of means.

What is not. Questions count for themselves; where a task has families of rewordings, which are answered alike, bets on
them are one bet made several times, and more may leave early than alpha says. That all of the best `keep` stay is not
promised at alpha; that the one best does, is. Leaving early does not say who is worst. Who left answered fewer
questions, and its score is not to be compared with the others' but on the first prefix, which all have answered.
Testing against whoever is `keep`-th *at the moment* would be no test at all: that opponent was picked for its luck
(`benchmarks/race.py --simulate`).
"""

import math
import random
from collections.abc import Hashable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Matrix = NDArray[np.float64]

BETS = 48
"""Nodes of the mixture over bets: with outcomes of 0 and 1 it equals the closed form to 1e-11 over 1,000 questions."""

WORST_NATS = -10.0
"""A log-probability a token below it counts as it: a blind guess among 22,000 tokens. A bet needs bounded outcomes."""

_CHUNK = 32
"""Questions whose bets are multiplied before a logarithm is taken: factors of at least 1e-4 cannot underflow."""


def log_e_value(only_i: Matrix, only_j: Matrix) -> Matrix:
    """The logarithm of E_ij, elementwise.

    Args:
        only_i: questions that i answered right and j wrong, integers from 0.
        only_j: the same with i and j changed over.

    Returns:
        log E_ij in nats, of the arguments' shape. Where i is better by more than about 1,000 questions the incomplete
        beta function underflows and the result is -inf, which no decision can tell from the true value.
    """
    b, c = np.asarray(only_i, dtype=float), np.asarray(only_j, dtype=float)
    with np.errstate(divide="ignore"):
        tail = np.log(special.betainc(b + 1, c + 1, 0.5))
    logs: Matrix = (b + c + 1) * math.log(2) + special.betaln(b + 1, c + 1) + tail
    return logs


def log_e_matrix(scores: NDArray[np.bool_] | Matrix, weights: Matrix | None = None) -> Matrix:
    """The logarithm of E_ij for all pairs, from what each entrant scored on the same questions.

    Outcomes that are right or wrong and count alike have the closed form. Others are bet on in pairs: E_ij is the mean
    over bets l in (0, 1) of prod_q (1 + l w_q (s_jq - s_iq)), which for right-or-wrong outcomes of equal weight is that
    very form (Waudby-Smith and Ramdas 2024, arXiv 2010.09686).

    Args:
        scores: shape (entrants, questions); bool; or real numbers in 0..1; or nats a token, all at most 0.
        weights: how much each question counts, above 0, shape (questions,); only their ratios matter.

    Returns:
        Shape (entrants, entrants), in nats; row i holds what speaks against i. The diagonal is -inf.

    Raises:
        ValueError: a score or a weight out of its range.
    """
    equal = weights is None or bool(np.all(weights == weights[0]))
    right = scores.astype(np.bool_) if scores.dtype == np.bool_ else None
    if right is not None and equal:
        only_i = _only(right)
        logs = log_e_value(only_i, only_i.T)
    else:
        weights = np.ones(scores.shape[1]) if weights is None else weights
        if not np.all((weights > 0) & np.isfinite(weights)):
            raise ValueError("a question's weight is above 0 and finite")
        weights = weights / weights.max()
        wealth = (
            _log_bets(_bounded(scores.astype(np.float64)), weights)
            if right is None
            else _log_bets_by_count(right, weights)
        )
        logs = special.logsumexp(wealth, axis=0, b=_bets()[1][:, None, None])
    np.fill_diagonal(logs, -np.inf)
    return logs


def _only(right: NDArray[np.bool_]) -> Matrix:
    """How many questions the row's entrant has right and the column's has not."""
    counted = right.astype(np.float32)  # exact up to 2^24 questions, and fast
    return (counted @ (1 - counted).T).astype(np.float64)


def _log_bets_by_count(right: NDArray[np.bool_], weights: Matrix) -> Matrix:
    """What each bet has come to, shape (BETS, entrants, entrants): only counts matter, for each weight that occurs."""
    bets = _bets()[0][:, None, None]
    wealth = np.zeros((len(bets), len(right), len(right)))
    for weight in np.unique(weights):
        only_i = _only(right[:, weights == weight])
        wealth += only_i.T * np.log1p(bets * weight) + only_i * np.log1p(-bets * weight)
    return wealth


def _bounded(scores: Matrix) -> Matrix:
    """Graded scores in 0..1."""
    if np.all(scores <= 0):
        # Nats: shifted and shrunk, so that the mean remains the score, and not turned into probabilities, whose mean
        # ranks otherwise.
        scores = 1 - np.maximum(scores, WORST_NATS) / WORST_NATS
    if not np.all((scores >= 0) & (scores <= 1)):
        raise ValueError(
            "a score of one question lies in 0..1, or is a log-probability; scale the scores before the race"
        )
    return scores


def _log_bets(scores: Matrix, weights: Matrix) -> Matrix:
    """The same, question by question."""
    scores = scores * weights
    bets = _bets()[0][:, None, None]
    wealth = np.zeros((len(bets), len(scores), len(scores)))
    for start in range(0, scores.shape[1], _CHUNK):
        product = np.ones_like(wealth)
        for each in scores[:, start : start + _CHUNK].T:
            product *= 1 + bets * (each[None, None, :] - each[None, :, None])
        wealth += np.log(product)
    return wealth


@cache
def _bets() -> tuple[Matrix, Matrix]:
    """Bets in (0, 1) and their shares, by Gauss and Legendre: a positive mixture, so it is itself an e-process."""
    nodes, shares = np.polynomial.legendre.leggauss(BETS)
    return (nodes + 1) / 2, shares / 2


def leaving(log_e: Matrix, keep: int, alpha: float) -> NDArray[np.bool_]:
    """Who leaves: those whose N - keep smallest e-values have a mean of at least 1 / alpha.

    Args:
        log_e: as of `log_e_matrix`, shape (N, N), diagonal -inf.
        keep: how many are to be found, at least 1; with as many entrants or fewer nobody leaves.
        alpha: probability at which one of them may leave wrongly, in (0, 1).

    Returns:
        Shape (N,).
    """
    entrants = len(log_e)
    if entrants <= keep:
        return np.zeros(entrants, dtype=bool)
    # The diagonal sorts first and is left out.
    smallest = np.sort(log_e, axis=1)[:, 1 : entrants - keep + 1]
    with np.errstate(divide="ignore"):
        log_mean = special.logsumexp(smallest, axis=1) - math.log(entrants - keep)
    left: NDArray[np.bool_] = log_mean >= -math.log(alpha)
    return left


class Race:
    """One race: who is still in it, and all e-values so far.

    Two entrants are compared on the questions both have answered: when one leaves, its e-values stand.

    Args:
        entrants: how many start.
        keep: how many are to be found; that many always stay.
        alpha: see `leaving`.

    Attributes:
        active: who is in the race, shape (entrants,), bool.
    """

    def __init__(self, entrants: int, keep: int, alpha: float):
        self.active = np.ones(entrants, dtype=bool)
        self.keep, self.alpha = keep, alpha
        self._log_e = np.full((entrants, entrants), -np.inf)

    def look(
        self,
        scores: NDArray[np.bool_] | Matrix,
        weights: Matrix | None = None,
        eligible: NDArray[np.bool_] | None = None,
    ) -> list[int]:
        """Let those leave who are surely not among the best.

        Args:
            scores: of the active entrants, in their order, on all questions of this prefix; (active, questions).
            weights: of the questions; see `log_e_matrix`.
            eligible: which entrants may win, shape (entrants,); others drop nobody. All by default.

        Returns:
            Who leaves now, as indices of entrants, in rising order.
        """
        racing = np.flatnonzero(self.active)
        self._log_e[np.ix_(racing, racing)] = log_e_matrix(scores, weights)
        against = self._log_e if eligible is None else np.where(eligible, self._log_e, -np.inf)
        left = np.flatnonzero(leaving(against, self.keep, self.alpha) & self.active)
        # At least `keep` stay, whatever the dice said: the worst of those who would leave go first.
        most = max(0, len(racing) - self.keep)
        if len(left) > most:
            total = dict(zip(racing.tolist(), _totals(scores, weights).tolist(), strict=True))
            left = np.sort(np.array(sorted(left.tolist(), key=total.__getitem__)[:most], dtype=int))
        self.active[left] = False
        return [int(i) for i in left]


def _totals(scores: NDArray[np.bool_] | Matrix, weights: Matrix | None) -> Matrix:
    totals: Matrix = np.asarray(scores, dtype=float) @ (
        np.ones(scores.shape[1]) if weights is None else weights
    )
    return totals


def question_order(groups: Sequence[Hashable], seed: int) -> list[int]:
    """One order of the questions for all entrants of an iteration.

    Args:
        groups: the group of each question.
        seed: another one gives another order.

    Returns:
        Positions of the questions. Each group is shuffled, and the groups are spread evenly: equal ones take turns.
    """
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    draw, ranked = random.Random(seed), list[tuple[float, int, int]]()
    for number, positions in enumerate(members.values()):
        draw.shuffle(positions)
        ranked += [((r + 0.5) / len(positions), number, p) for r, p in enumerate(positions)]
    return [position for _, _, position in sorted(ranked)]


def prefixes(groups: Sequence[Hashable], first: int, growth: float) -> list[int]:
    """After how many questions one looks: `first`, then each time `growth` times as many, and at last all.

    Args:
        groups: the group of each question.
        first: questions that every entrant answers, at least 1.
        growth: above 1.

    Returns:
        Rising numbers, whole rounds of the groups; the last is the number of questions.
    """
    total, round_ = len(groups), len(set(groups))
    sizes, wanted = list[int](), float(first)
    while not sizes or sizes[-1] < total:
        size = min(total, round_ * math.ceil(wanted / round_))
        if not sizes or size > sizes[-1]:
            sizes.append(size)
        wanted = max(wanted * growth, wanted + 1)
    return sizes
