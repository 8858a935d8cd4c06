"""Rivals: human-designed methods, each tuned with as many evaluations as the learning arm spent on candidates."""

import random
from collections.abc import Iterator
from typing import Any

from selfdev.algorithms.library import method
from selfdev.archive import Archive, Evaluation
from selfdev.evaluation.objective import kept_floors
from selfdev.streams import stream_seed


def settings_to_try(name: str, budget: int, experts: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The settings that tuning tries: the defaults first, then random draws from the search ranges.

    Args:
        name: of the method.
        budget: how many evaluations it has; a method without searched parameters uses one.
        experts: how many experts are merged.
        seed: the run's.

    Yields:
        The number of the setting and its parameters; the same number always gives the same setting.
    """
    rival = method(name)
    if not any(parameter.searched for parameter in rival.parameters):
        budget = min(budget, 1)
    for number in range(budget):
        draw = random.Random(stream_seed(seed, "rival", name, number))
        yield number, rival.sample(draw, experts) if number else rival.defaults(experts)


def best_of(evaluations: list[Evaluation]) -> Evaluation | None:
    """The best score, the earlier one where two are equal; None if nothing was scored."""
    scored = [e for e in evaluations if e.score is not None]
    return max(scored, key=lambda e: e.score or 0.0, default=None)


def best_rival(archive: Archive, name: str | None = None) -> Evaluation | None:
    """The rival and setting, or the setting of that rival, with the best development score so far; floors bind it."""
    return best_of(kept_floors(archive, archive.evaluations("rival", name)))
