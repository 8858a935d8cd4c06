"""Who is ahead on development among the new programs of an arm.

Only those who answered every question and lose nowhere more than the run's floors allow can win. One that left a race
early has a score of its own, on fewer questions, which ranks it nowhere; what all of an iteration have in common are
their scores on the first prefix.
"""

import math
from collections.abc import Iterable

from selfdev.archive import Archive, Candidate, Evaluation
from selfdev.evaluation.objective import kept_floors, mean_by_group, pareto_set

LEARNING = "learning"
"""The arm whose factory is trained and that can win; every other arm of a run's config is a control."""

FEEDBACK = "feedback"
"""The control that is shown its own best programs."""

COMBINED = "learning_feedback"
"""The control that is trained, on its own programs, and shown its own best ones."""

_REPAIRED = "repaired"


def repairs_of(arm: str) -> str:
    """Where the working neighbours of an arm's failing programs are archived, as if of an arm of their own.

    Nobody wrote them: they are learned from, but never counted, and they cannot win.
    """
    return _REPAIRED if arm == LEARNING else f"{_REPAIRED}_{arm}"


def is_written(arm: str) -> bool:
    """Whether an arm's programs were written by its factory; those of `repairs_of` were not."""
    return not arm.startswith(_REPAIRED)


NORMED = 1
"""Number of the scaled evaluation at `scaling.norm`; those with higher ones are made just before the verdict."""


def ranked_new(archive: Archive, arm: str, *, tuned: bool = True) -> list[tuple[Candidate, Evaluation]]:
    """The new programs of one arm that can win, with their development evaluations, best first.

    Args:
        archive: of the run.
        arm: whose.
        tuned: whether a program counts with the best of all its scales, or of those that were tried before the tuning:
            as it was written, and at `scaling.norm`.
    """
    scaled = [e for e in _finished(archive, "scaled") if tuned or e.number == NORMED]
    finished = at_best_scale(kept_floors(archive, _finished(archive) + scaled))
    new = [(c, finished[c.name]) for c in archive.candidates(arm) if c.status == "new" and c.name in finished]
    return sorted(new, key=lambda pair: -(pair[1].score or 0.0))


def at_best_scale(evaluations: Iterable[Evaluation]) -> dict[str, Evaluation]:
    """Of each program the best evaluation; of equal ones the first."""
    best: dict[str, Evaluation] = {}
    for each in evaluations:
        if each.subject not in best or (each.score or 0.0) > (best[each.subject].score or 0.0):
            best[each.subject] = each
    return best


def scores_on_first(archive: Archive) -> dict[str, float]:
    """The score of every program on the questions that all of its iteration answered.

    Without a race that is every question, and a program counts with the better of the scales that all were scored at.
    """
    first: dict[str, float] = {}
    raced = any(e.first_questions is not None for e in archive.evaluations("candidate"))
    normed = [] if raced else [e for e in archive.evaluations("scaled") if e.number == NORMED]
    for each in archive.evaluations("candidate") + normed:
        if each.score_on_first is not None:
            first[each.subject] = max(first.get(each.subject, -math.inf), each.score_on_first)
    return first


def pareto(archive: Archive, arm: str) -> list[dict[str, object]]:
    """The new programs of one arm, each at its best scale, that no other one beats on every group, whatever they lose.

    Returns:
        For each its name, its score and its `groups`' scores, best score first.
    """
    finished = at_best_scale(_finished(archive) + _finished(archive, "scaled"))
    new = [c.name for c in archive.candidates(arm) if c.status == "new" and c.name in finished]
    by_group = {
        name: mean_by_group(archive.groups_of(finished[name]), finished[name].outcomes or ()) for name in new
    }
    order = list(dict.fromkeys(archive.groups("development")))
    by_group = {name: {group: each[group] for group in order} for name, each in by_group.items()}
    best_first = sorted(pareto_set(by_group), key=lambda name: -(finished[name].score or 0.0))
    return [{"name": name, "score": finished[name].score, "groups": by_group[name]} for name in best_first]


def _finished(archive: Archive, kind: str = "candidate") -> list[Evaluation]:
    """Evaluations of candidates on every development question."""
    questions = len(archive.groups("development"))
    scored = [e for e in archive.evaluations(kind) if e.score is not None]
    return [e for e in scored if e.questions == questions]
