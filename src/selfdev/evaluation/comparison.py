"""What the verdict says of one model on the test questions, and of two models on the same ones."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.archive import Archive, Evaluation
from selfdev.config import Config
from selfdev.evaluation.objective import Objective, mean_by_group
from selfdev.evaluation.statistics import (
    is_plain_share,
    mcnemar,
    paired_difference,
    permutation_test,
    score_interval,
)
from selfdev.streams import stream_seed


@dataclass(frozen=True)
class Comparison:
    """Compares models on the test questions, as the run scores them.

    Attributes:
        groups: of every test question.
        families: of every test question: what it and its rewordings have in common.
        objective: weights and floors.
        level: of every interval.
        seed: the run's.
    """

    groups: Sequence[str]
    families: Sequence[Hashable]
    objective: Objective
    level: float
    seed: int

    @classmethod
    def of(cls, archive: Archive, config: Config, families: Sequence[Hashable]) -> "Comparison":
        """The comparison that a run's config asks for."""
        objective = Objective.of(archive)
        return cls(archive.groups("test"), families, objective, config.verdict.level, config.seed)

    def score(self, test: Evaluation) -> dict[str, Any] | None:
        """The score, the number of questions and the interval; None where nothing was measured."""
        if test.outcomes is None:
            return None
        stream = stream_seed(self.seed, "score", test.subject)
        weights = self.objective.weights_of(self.groups)
        low, high = score_interval(_tensor(test), self.groups, self.level, stream, weights, self.families)
        return {"score": test.score, "questions": test.questions, "low": low, "high": high}

    def difference(self, test: Evaluation, against: Evaluation | None) -> dict[str, Any] | None:
        """The paired difference from another model; None where one was not measured, or both are the same.

        Outcomes that are right or wrong and count alike and for themselves are compared by McNemar's exact test, others
        by a stratified paired permutation test, in which questions of one family stay together.
        """
        if against is None or test.outcomes is None or against.outcomes is None:
            return None
        if (test.kind, test.subject, test.number) == (against.kind, against.subject, against.number):
            return None
        mine, theirs, weights = _tensor(test), _tensor(against), self.objective.weights_of(self.groups)
        stream = stream_seed(self.seed, "bootstrap", test.subject)
        interval = paired_difference(mine, theirs, self.groups, self.level, stream, weights, self.families)
        exact = is_plain_share(mine, self.groups, weights, self.families)
        p = (
            mcnemar(mine, theirs)
            if exact
            else permutation_test(mine, theirs, self.groups, stream, weights, self.families)
        )
        return {
            "difference": interval.difference,
            "low": interval.low,
            "high": interval.high,
            "level": self.level,
            "p": p,
            "p_adjusted": None,
            "test": "exact McNemar" if exact else "stratified paired permutation",
        }

    def retention(self, test: Evaluation, seed: Evaluation | None) -> dict[str, dict[str, float]]:
        """What the merge gained or, below 0, lost against the seed on each group, with its interval."""
        if seed is None or seed.outcomes is None or test.outcomes is None or test.kind == "seed":
            return {}
        mine, its, kept = _tensor(test), _tensor(seed), {}
        for group in dict.fromkeys(self.groups):
            members = torch.tensor([each == group for each in self.groups])
            families = [self.families[i] for i in members.nonzero()[:, 0].tolist()]
            stream = stream_seed(self.seed, "retention", test.subject, group)
            found = paired_difference(
                mine[members], its[members], level=self.level, seed=stream, families=families
            )
            kept[group] = {"difference": found.difference, "low": found.low, "high": found.high}
        return kept

    def below_floor(self, test: Evaluation, seed: Evaluation | None) -> dict[str, float]:
        """The groups on which it loses more against the seed than the run allows, and how much."""
        if seed is None or seed.outcomes is None or test.outcomes is None:
            return {}
        return self.objective.below_floor(self.groups, test.outcomes, seed.outcomes)


def by_task(dev: Mapping[str, float], test: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Each group's score on development and on test; None where nothing was measured."""
    return {group: {"dev": dev.get(group), "test": test.get(group)} for group in dict.fromkeys([*dev, *test])}


def group_scores(archive: Archive, evaluation: Evaluation) -> dict[str, float]:
    """The mean outcome of each group, in the order of the split; none where nothing was measured."""
    if evaluation.outcomes is None:
        return {}
    found = mean_by_group(archive.groups_of(evaluation), evaluation.outcomes)
    return {
        group: found[group] for group in dict.fromkeys(archive.groups(evaluation.split)) if group in found
    }


def shrinkage(dev: Evaluation, test: Evaluation, seed: tuple[Evaluation, Evaluation] | None) -> float | None:
    """How much of the gain on the seed was lost from development to test; the winner's curse shows here.

    The gain and not the score, since one split's questions may be harder than the other's: the seed was never chosen.
    """
    scores = (dev.score, test.score, *((e.score for e in seed) if seed else (None,)))
    if None in scores or dev.kind == "seed":
        return None
    mine, mine_on_test, its, its_on_test = (score or 0.0 for score in scores)
    return (mine - its) - (mine_on_test - its_on_test)


def _tensor(evaluation: Evaluation) -> Tensor:
    outcomes = torch.tensor(evaluation.outcomes)
    return outcomes if outcomes.dtype == torch.bool else outcomes.double()
