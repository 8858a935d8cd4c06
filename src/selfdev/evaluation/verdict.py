"""The verdict: what the run found, on questions that nothing before has seen.

Before the test split is opened, two things are fixed and archived: the new program that is best on development and
the rival that is best on development. Their paired difference on test is the headline. The other finalists, all
rivals at their tuned best, the controls' best and the seed meet the same questions, once. Where the best on test is
shown, that is a selection on test and labelled so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from selfdev.archive import Archive, Candidate, Evaluation
from selfdev.config import Config
from selfdev.evaluation.evaluator import Refused, Scorer
from selfdev.evaluation.rivals import best_of, best_rival
from selfdev.evaluation.statistics import holm, mcnemar, paired_difference, wilson
from selfdev.streams import stream_seed

LEARNING = "learning"
"""The arm whose factory is trained; every other arm is a control."""


@dataclass(frozen=True)
class Row:
    """One line of the verdict's table, as `selfdev show --json` prints it.

    Attributes:
        name: seed, method or candidate.
        kind: `seed`, `rival`, `control` or `discovered`.
        dev: score on development and the number of questions.
        test: score on test, the number of questions and the interval of the score.
        against_best_rival: paired difference on test from the rival that was best on development; None for that
            rival itself and where nothing was measured.
        parameters: of a rival.
    """

    name: str
    kind: str
    dev: dict[str, Any]
    test: dict[str, Any] | None
    against_best_rival: dict[str, Any] | None
    parameters: dict[str, Any]


def ranked_new(archive: Archive, arm: str) -> list[tuple[Candidate, Evaluation]]:
    """New programs of one arm with their development evaluations, best first."""
    scored = {e.subject: e for e in archive.evaluations("candidate") if e.score is not None}
    new = [(c, scored[c.name]) for c in archive.candidates(arm) if c.status == "new" and c.name in scored]
    return sorted(new, key=lambda pair: -(pair[1].score or 0.0))


def reach_verdict(
    archive: Archive,
    config: Config,
    scorer: Scorer,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Open the test split and measure everybody on it.

    Args:
        archive: of a run whose last iteration is over; the result is archived in it.
        config: the run's.
        scorer: merges and scores.
        tick: called with how many are measured, and of how many.

    Returns:
        `best` (name of the discovered program, or None), `best_rival`, `table` (rows in the order of `Row`'s kinds),
        `headline` (a sentence) and `best_on_test` (a selection on test).
    """
    archive.set_status("verdict")
    finalists = ranked_new(archive, LEARNING)[: config.verdict.finalists]
    rival = best_rival(archive)
    archive.fix_verdict(
        {
            "best": finalists[0][0].name if finalists else None,
            "best_rival": None if rival is None else [rival.subject, rival.number],
        }
    )
    scorer.open_test(config.task.test, archive)
    archive.set_questions("test", [(q.id, q.group) for q in scorer.questions("test")])
    entrants = _entrants(archive, config, finalists)
    measured = {(e.kind, e.subject, e.number): e for e in archive.evaluations(split="test")}
    for done, (_, dev, candidate) in enumerate(entrants):
        tick(done, len(entrants))
        key = (dev.kind, dev.subject, dev.number)
        if key not in measured:
            measured[key] = _measure(scorer, dev, candidate)
            archive.add_evaluation(measured[key])
    tick(len(entrants), len(entrants))
    result = _compare(archive, config, entrants, measured, rival)
    archive.set_verdict(result)
    return result


_Entrant = tuple[str, Evaluation, Candidate | None]


def _entrants(
    archive: Archive, config: Config, finalists: list[tuple[Candidate, Evaluation]]
) -> list[_Entrant]:
    """(kind, development evaluation, candidate) of everybody who is measured on test."""
    entrants: list[_Entrant] = [("seed", e, None) for e in archive.evaluations("seed")]
    for name in config.rivals:
        tuned = best_of(archive.evaluations("rival", name))
        if tuned is not None:
            entrants.append(("rival", tuned, None))
    for control in config.controls:
        entrants += [("control", dev, candidate) for candidate, dev in ranked_new(archive, control)[:1]]
    return entrants + [("discovered", dev, candidate) for candidate, dev in finalists]


def _measure(scorer: Scorer, dev: Evaluation, candidate: Candidate | None) -> Evaluation:
    if candidate is not None:
        try:
            return scorer.candidate(candidate, "test")
        except Refused as refused:
            # It ran on these very tensors before, so this is a machine in trouble and no verdict on the program.
            count = len(scorer.questions("test"))
            return Evaluation("candidate", dev.subject, 0, "test", None, None, count, {}, str(refused))
    if dev.kind == "seed":
        return scorer.seed("test")
    return scorer.rival(dev.subject, dev.number, dev.parameters, "test")


def _compare(
    archive: Archive,
    config: Config,
    entrants: list[_Entrant],
    measured: dict[tuple[str, str, int], Evaluation],
    rival: Evaluation | None,
) -> dict[str, Any]:
    level = config.verdict.level
    tests = [measured[(dev.kind, dev.subject, dev.number)] for _, dev, _ in entrants]
    against = None if rival is None else measured.get((rival.kind, rival.subject, rival.number))
    differences = [_difference(test, against, archive.groups("test"), config) for test in tests]
    # Holm over the finalists: several discoveries are tested against one rival.
    finalists = [i for i, (kind, _, _) in enumerate(entrants) if kind == "discovered" and differences[i]]
    adjusted = holm([differences[i]["p"] for i in finalists])  # type: ignore[index]
    for i, p in zip(finalists, adjusted, strict=True):
        differences[i]["p_adjusted"] = p  # type: ignore[index]
    rows = []
    for (kind, dev, _), test, difference in zip(entrants, tests, differences, strict=True):
        shown = {"score": dev.score, "questions": dev.questions}
        rows.append(Row(dev.subject, kind, shown, _shown(test, level), difference, dict(dev.parameters)))
    discovered = [row for row in rows if row.kind == "discovered" and row.test]
    return {
        "best": next((row.name for row in rows if row.kind == "discovered"), None),
        "best_rival": None if rival is None else rival.subject,
        "best_on_test": max(discovered, key=lambda r: r.test["score"]).name if discovered else None,  # type: ignore[index]
        "headline": _headline(rows, None if rival is None else rival.subject),
        "table": [asdict(row) for row in rows],
    }


def _shown(test: Evaluation, level: float) -> dict[str, Any] | None:
    if test.outcomes is None:
        return None
    low, high = wilson(sum(test.outcomes), len(test.outcomes), level)
    return {"score": test.score, "questions": test.questions, "low": low, "high": high}


def _difference(
    test: Evaluation, against: Evaluation | None, groups: list[str], config: Config
) -> dict[str, Any] | None:
    if against is None or test.outcomes is None or against.outcomes is None:
        return None
    if (test.kind, test.subject, test.number) == (against.kind, against.subject, against.number):
        return None
    mine, theirs = Tensor(test.outcomes).bool(), Tensor(against.outcomes).bool()
    seed = stream_seed(config.seed, "bootstrap", test.subject)
    interval = paired_difference(mine, theirs, groups, config.verdict.level, seed)
    return {
        "difference": interval.difference,
        "low": interval.low,
        "high": interval.high,
        "level": config.verdict.level,
        "p": mcnemar(mine, theirs),
        "p_adjusted": None,
    }


def _headline(rows: list[Row], rival: str | None) -> str:
    best = next((row for row in rows if row.kind == "discovered"), None)
    if best is None:
        return "no new program was found: nothing to compare"
    if rival is None:
        return f"{best.name}: there is no rival to compare with"
    difference = best.against_best_rival
    if difference is None:
        return f"{best.name} could not be measured on test"
    points = (
        f"{100 * difference['difference']:+.1f} points on test, {100 * difference['level']:.0f} % interval "
    )
    points += f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"
    if difference["low"] > 0:
        return f"{best.name} beats {rival}, the best rival on development: {points}"
    if difference["high"] < 0:
        return f"{best.name} loses to {rival}, the best rival on development: {points}"
    return f"no difference shown between {best.name} and {rival}, the best rival on development: {points}"
