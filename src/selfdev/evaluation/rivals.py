"""Rivals: human-designed methods, each tuned with as many evaluations as the learning arm spent on candidates."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from selfdev.algorithms.library import method
from selfdev.archive import Archive, Evaluation
from selfdev.config import Config
from selfdev.evaluation.evaluator import Scorer
from selfdev.evaluation.objective import kept_floors
from selfdev.evaluation.standing import LEARNING, repairs_of
from selfdev.streams import stream_seed


def spent_on_candidates(archive: Archive) -> int:
    """How many development evaluations the learning arm has spent so far, on programs and repairs, at all scales."""
    evaluations = archive.evaluations("candidate") + archive.evaluations("scaled")
    return sum(e.subject.startswith((f"{LEARNING}/", f"{repairs_of(LEARNING)}/")) for e in evaluations)


def tune_rivals(
    archive: Archive,
    config: Config,
    scorer: Scorer,
    budget: int,
    tick: Callable[[int, int, str], None],
    told: Callable[[Evaluation | None], None],
) -> None:
    """Score rivals on development until each has had its evaluations; those that are archived count.

    Args:
        archive: of what is run.
        config: names the rivals.
        scorer: merges and scores.
        budget: evaluations of each.
        tick: called with how many are done, of how many, and the rival's name.
        told: called after each rival with the best of all so far.
    """
    for index, name in enumerate(config.rivals):
        known = {e.number for e in archive.evaluations("rival", name)}
        for number, parameters in settings_to_try(name, budget, len(config.merge.experts), config.seed):
            if number not in known:
                tick(index * budget + number, budget * len(config.rivals), name)
                archive.add_evaluation(scorer.rival(name, number, parameters, "development"))
        told(best_rival(archive))


def settings_to_try(name: str, budget: int, experts: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The settings that tuning tries: the defaults first, then random draws from the search ranges.

    Args:
        name: of the method.
        budget: how many evaluations it has.
        experts: how many experts are merged.
        seed: the run's.

    Yields:
        The number of the setting and its parameters; the same number always gives the same setting.
    """
    rival = method(name)
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
