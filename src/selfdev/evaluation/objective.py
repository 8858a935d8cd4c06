"""What a run is after: several tasks as one score, floors under single tasks, and who is beaten on none of them.

A task here is a group of questions. The score is the weighted mean over the groups of the mean outcome there. A floor
says how many points a merged model may lose against the seed on one group, on the same questions; who loses more may
not win, whatever its score.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from selfdev.archive import Archive, Evaluation


@dataclass(frozen=True)
class Objective:
    """Weights and floors of a run.

    Attributes:
        weights: of groups, above 0; a group that is not named weighs 1. Only their ratios matter.
        floors: of groups: how much may be lost against the seed, in 0..1.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, archive: Archive) -> "Objective":
        """The objective of an archived run."""
        task = archive.run.config["task"]
        floors = {group: points / 100 for group, points in task.get("floors", {}).items()}
        return cls(task.get("weights", {}), floors)

    def aggregate(self, by_group: Mapping[str, float]) -> float:
        """One score from the groups' scores."""
        weights = {group: self.weights.get(group, 1.0) for group in by_group}
        return sum(weights[group] * score for group, score in by_group.items()) / sum(weights.values())

    def score(self, groups: Sequence[str], outcomes: Sequence[float]) -> float:
        """The score of a model that has these outcomes on questions of these groups."""
        return self.aggregate(mean_by_group(groups, outcomes))

    def weights_of(self, groups: Sequence[str]) -> dict[Hashable, float]:
        """The weight of every group."""
        return {group: self.weights.get(group, 1.0) for group in dict.fromkeys(groups)}

    def shares(self, groups: Sequence[str]) -> NDArray[np.float64]:
        """What each question counts in the score, shape (questions,); the sum is 1."""
        asked = {group: groups.count(group) for group in dict.fromkeys(groups)}
        shares = np.array([self.weights.get(group, 1.0) / asked[group] for group in groups])
        normed: NDArray[np.float64] = shares / shares.sum()
        return normed

    def below_floor(
        self, groups: Sequence[str], outcomes: Sequence[float], seed: Sequence[float]
    ) -> dict[str, float]:
        """The groups in which a model loses more than it may, and by how much it loses, in 0..1.

        Args:
            groups: of the questions.
            outcomes: of the model on them.
            seed: the seed's outcomes on the same questions.
        """
        if not self.floors:
            return {}
        mine, its = mean_by_group(groups, outcomes), mean_by_group(groups, seed)
        lost = {group: its[group] - mine[group] for group in self.floors if group in mine}
        # A loss of exactly the floor is allowed, however it was rounded.
        return {group: loss for group, loss in lost.items() if loss > self.floors[group] + 1e-9}


def mean_by_group(groups: Sequence[str], outcomes: Sequence[float]) -> dict[str, float]:
    """The mean outcome in each group; groups in the order of their first question."""
    collected: dict[str, list[float]] = {}
    for group, outcome in zip(groups, outcomes, strict=True):
        collected.setdefault(group, []).append(outcome)
    return {group: sum(each) / len(each) for group, each in collected.items()}


def kept_floors(archive: Archive, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of the development evaluations that lose nowhere more than they may."""
    objective = Objective.of(archive)
    seed = next((e.outcomes for e in archive.evaluations("seed")), None)
    if not objective.floors or seed is None:
        return list(evaluations)
    kept = []
    for e in evaluations:
        its = seed if e.asked is None else [seed[position] for position in e.asked]
        if e.outcomes is not None and not objective.below_floor(archive.groups_of(e), e.outcomes, its):
            kept.append(e)
    return kept


def pareto_set(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Who is beaten by nobody: no other is at least as good on every group and better on one.

    Args:
        scores: of each name, by group; all have the same groups.

    Returns:
        Names in the order given; of those with equal scores everywhere, all.
    """
    names = list(scores)
    if not names:
        return []
    table = np.array([list(scores[name].values()) for name in names])
    at_least = np.all(table[None, :] >= table[:, None], axis=-1)
    better = np.any(table[None, :] > table[:, None], axis=-1)
    beaten = np.any(at_least & better, axis=1).tolist()
    return [name for name, is_beaten in zip(names, beaten, strict=True) if not is_beaten]
