"""Which programs are surely better than others, or than the seed, by what they answered on development.

The measure is the e-value of the races (`race.py`), on the questions that both have answered. A program counts with
the best of the scales that were tried in its iteration, so with a second scale the e-value favours it somewhat: it
decides what is learned from, not what is claimed; claims rest on the verdict.
"""

import math

import numpy as np
from numpy.typing import NDArray

from selfdev.archive import Archive, Evaluation
from selfdev.evaluation.objective import Objective, kept_floors
from selfdev.evaluation.race import log_e_matrix
from selfdev.evaluation.standing import NORMED, at_best_scale

SURE = 20.0
"""The e-value from which a program is called better where no other threshold is given: at most 1 in 20 by chance."""


class Evidence:
    """What speaks for one program against another.

    Args:
        archive: of the run.
        threshold: the e-value that is asked for; with 0 whoever answered and keeps the floors is better than anybody.
    """

    def __init__(self, archive: Archive, threshold: float = SURE):
        self.threshold = threshold
        self.objective = Objective.of(archive)
        self.groups = archive.groups("development")
        scaled = [e for e in archive.evaluations("scaled") if e.number == NORMED]
        # One that left a race has fewer outcomes, and none that came later.
        answered = [e for e in archive.evaluations("candidate") + scaled if e.outcomes is not None]
        self._best = at_best_scale(answered)
        self._worthy = at_best_scale(kept_floors(archive, answered))
        self._seed = next(iter(archive.evaluations("seed", split="development")), None)

    def better(self, name: str, other: str | None = None) -> bool:
        """Whether a program is surely better than another one; than the seed by default.

        Args:
            name: of a program with outcomes; one that breaks `task.floors` is better than nobody.
            other: of another one.
        """
        mine, theirs = self._worthy.get(name), self._seed if other is None else self._best.get(other)
        if self.threshold == 0:
            return mine is not None
        if mine is None or theirs is None or mine is theirs:
            return False
        common, scores = _paired(theirs, mine)
        weights = self.objective.shares([self.groups[position] for position in common])
        return bool(log_e_matrix(scores, weights)[0, 1] >= math.log(self.threshold))

    def doubt(self, name: str, other: str) -> float:
        """The probability that one program is in truth no better than another, as far as their answers tell.

        It is the normal approximation for their paired difference, weighted as the run scores.

        Args:
            name: of a program.
            other: of another one.

        Returns:
            In 0..1; 0.5 where they answered everything alike, and 0 where one of the two answered nothing: it failed.
        """
        mine, theirs = self._best.get(name), self._best.get(other)
        if mine is None or theirs is None:
            return 0.0
        common, scores = _paired(theirs, mine)
        shares = self.objective.shares([self.groups[position] for position in common])
        difference = np.subtract(scores[1], scores[0], dtype=float)
        mean = float(shares @ difference)
        variance = float(shares**2 @ (difference - mean) ** 2) * len(common) / max(1, len(common) - 1)
        if variance == 0:
            return 0.5 if mean == 0 else float(mean < 0)
        return 0.5 * math.erfc(mean / math.sqrt(2 * variance))


def _paired(a: Evaluation, b: Evaluation) -> tuple[list[int], NDArray[np.float64] | NDArray[np.bool_]]:
    """The questions that both have answered, as positions, and what each scored there, shape (2, questions)."""
    answers = [
        dict(zip(e.asked or range(len(e.outcomes or ())), e.outcomes or (), strict=True)) for e in (a, b)
    ]
    common = sorted(answers[0].keys() & answers[1].keys())
    scores = np.array([[answered[position] for position in common] for answered in answers], dtype=float)
    return common, scores.astype(np.bool_) if np.isin(scores, (0.0, 1.0)).all() else scores
