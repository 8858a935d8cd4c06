"""The course of an iteration: which questions its new programs are asked, in which order, and who goes on.

With `race: off` every program answers every question, once it is screened. Else it answers the first prefix then, and
the rest is raced when all are screened. Every step is archived before the next one, and who goes on follows from what
is archived; so a race that was cut off goes on where it was, and ends as it would have ended.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from selfdev.archive import Archive, Candidate, Evaluation
from selfdev.config import Config
from selfdev.evaluation.evaluator import Refused, Scorer
from selfdev.evaluation.objective import Objective
from selfdev.evaluation.race import Race, prefixes, question_order
from selfdev.streams import stream_seed

DEVELOPMENT = "development"


class Course:
    """The course of one arm's iteration.

    Args:
        archive: the run's.
        config: the run's.
        arm: whose programs race against each other.
        iteration: from 0; all its arms have the same order of questions.
    """

    def __init__(self, archive: Archive, config: Config, arm: str, iteration: int):
        self.archive, self.arm, self.iteration = archive, arm, iteration
        self.settings = config.race
        chosen = config.preferences
        share = math.ceil(chosen.chosen_share * config.budgets[iteration])
        self.keep = max(chosen.elites, chosen.chosen_floor, share)
        self.objective = Objective.of(archive)
        if self.settings is not None:
            groups = archive.groups(DEVELOPMENT)
            self.order = question_order(groups, stream_seed(config.seed, "race", iteration))
            self.groups = [groups[position] for position in self.order]
            self.sizes = prefixes(groups, self.settings.first, self.settings.growth)

    def start(self, scorer: Scorer, candidate: Candidate) -> Evaluation:
        """Ask a program that is new the first questions: all of them, where there is no race.

        Raises:
            Refused: it cannot be scored.
        """
        if self.settings is None:
            return scorer.candidate(candidate, DEVELOPMENT)
        found = scorer.candidate(candidate, DEVELOPMENT, self.order[: self.sizes[0]])
        return replace(found, first_questions=found.questions, first_score=found.score)

    def finish(self, scorer: Scorer, tick: Callable[[str], None]) -> list[Evaluation]:
        """Race all that have started.

        Args:
            scorer: asks the questions.
            tick: called before a program is asked more, with a note on how the race stands.

        Returns:
            The evaluations of those who answered every question.
        """
        finished = None if self.settings is not None else self._entered()
        while finished is None:
            finished = self._race(scorer, tick)
        return [evaluation for _, evaluation in finished]

    def _entered(self) -> list[tuple[Candidate, Evaluation]]:
        scored = {e.subject: e for e in self.archive.evaluations("candidate") if e.score is not None}
        candidates = self.archive.candidates(self.arm, self.iteration)
        return [(c, scored[c.name]) for c in candidates if c.status == "new" and c.name in scored]

    def _race(self, scorer: Scorer, tick: Callable[[str], None]) -> list[tuple[Candidate, Evaluation]] | None:
        """One race from its start, over what is archived; None where one fails, and it must be run without it."""
        assert self.settings is not None
        entered = self._entered()
        race = Race(len(entered), self.keep, self.settings.alpha)
        eligible = np.ones(len(entered), dtype=bool)
        for size in self.sizes:
            racing = np.flatnonzero(race.active).tolist()
            for i in racing:
                candidate, evaluation = entered[i]
                if evaluation.questions < size:
                    tick(f"{len(racing)} of {len(entered)} race on {size} questions")
                    longer = self._asked_more(scorer, candidate, evaluation, size)
                    if longer is None:
                        return None
                    entered[i] = candidate, longer
            scores = _scores([entered[i][1] for i in racing], size)
            if size < self.sizes[-1] and racing:
                eligible[racing] = self._keeping_floors(scores)
                race.look(scores, self.objective.shares(self.groups[:size]), eligible)
        return [entered[i] for i in np.flatnonzero(race.active)]

    def _asked_more(
        self, scorer: Scorer, candidate: Candidate, before: Evaluation, size: int
    ) -> Evaluation | None:
        """Ask a program the questions up to `size`, and archive what it scored; None if it fails."""
        try:
            more = scorer.candidate(candidate, DEVELOPMENT, self.order[before.questions : size])
            failure, error = ("ScoringError", more.failure) if more.outcomes is None else ("", None)
        except Refused as refused:
            failure, error = refused.failure, refused.error
        if error is not None or more.outcomes is None:
            failed = replace(before, score=None, outcomes=None, first_score=None, failure=error)
            self.archive.set_screened(
                replace(candidate, status="failed", failure=failure, error=error), failed
            )
            return None
        outcomes = (before.outcomes or ()) + more.outcomes
        longer = replace(
            before,
            outcomes=outcomes,
            score=self.objective.score(self.groups[:size], outcomes),
            questions=size,
            asked=tuple(self.order[:size]),
            seconds=before.seconds + more.seconds,
        )
        self.archive.extend_evaluation(longer)
        return longer

    def _keeping_floors(self, scores: NDArray[np.bool_] | NDArray[np.float64]) -> list[bool]:
        size = scores.shape[1]
        [seed] = self.archive.evaluations("seed")
        if not self.objective.floors or seed.outcomes is None:
            return [True] * len(scores)
        its = [seed.outcomes[position] for position in self.order[:size]]
        return [not self.objective.below_floor(self.groups[:size], row, its) for row in scores.tolist()]


def _scores(evaluations: list[Evaluation], size: int) -> NDArray[np.bool_] | NDArray[np.float64]:
    """Outcomes on the first questions, shape (entrants, size)."""
    return np.array([(e.outcomes or ())[:size] for e in evaluations])
