"""The verdict: what the run found, on questions that nothing before has seen.

Before the test split is opened, two things are fixed and archived: the new program that is best on development and
the rival that is best on development. Their paired difference on test is the headline. The other finalists, all
rivals at their tuned best, the controls' best and the seed meet the same questions, once. Where the best on test is
shown, that is a selection on test and labelled so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from selfdev.archive import Archive, Candidate, Evaluation
from selfdev.config import Config
from selfdev.evaluation.comparison import Comparison, by_task, group_scores, shrinkage
from selfdev.evaluation.evaluator import Scorer, score_again
from selfdev.evaluation.rivals import best_of, best_rival
from selfdev.evaluation.standing import LEARNING, pareto, ranked_new
from selfdev.evaluation.statistics import holm


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
        tasks: score of each group on development and on test.
        retention: difference from the seed on test for each group, with its interval; empty for the seed.
        below_floor: groups on which it loses more on test than the run allows, and how much it loses.
        shrinkage: how much of its gain on the seed was lost from development to test.
    """

    name: str
    kind: str
    dev: dict[str, Any]
    test: dict[str, Any] | None
    against_best_rival: dict[str, Any] | None
    parameters: dict[str, Any]
    tasks: dict[str, dict[str, float | None]]
    retention: dict[str, dict[str, float]]
    below_floor: dict[str, float]
    shrinkage: float | None


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
            "pareto": pareto(archive, LEARNING),
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
        # Where no setting keeps the floors, the best of all is measured, and the table says what it loses.
        tuned = best_rival(archive, name) or best_of(archive.evaluations("rival", name))
        if tuned is not None:
            entrants.append(("rival", tuned, None))
    for control in config.controls:
        entrants += [("control", dev, candidate) for candidate, dev in ranked_new(archive, control)[:1]]
    return entrants + [("discovered", dev, candidate) for candidate, dev in finalists]


def _measure(scorer: Scorer, dev: Evaluation, candidate: Candidate | None) -> Evaluation:
    if candidate is not None:
        return score_again(scorer, candidate, "test", dev.number, dev.factor)
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
    comparison = Comparison.of(archive, config)
    tests = [measured[(dev.kind, dev.subject, dev.number)] for _, dev, _ in entrants]
    against = None if rival is None else measured.get((rival.kind, rival.subject, rival.number))
    seed = next(
        ((dev, test) for (_, dev, _), test in zip(entrants, tests, strict=True) if dev.kind == "seed"), None
    )
    seed_on_test = None if seed is None else seed[1]
    differences = [comparison.difference(test, against) for test in tests]
    # Holm over the finalists: several discoveries are tested against one rival.
    finalists = [i for i, (kind, _, _) in enumerate(entrants) if kind == "discovered" and differences[i]]
    adjusted = holm([differences[i]["p"] for i in finalists])  # type: ignore[index]
    for i, p in zip(finalists, adjusted, strict=True):
        differences[i]["p_adjusted"] = p  # type: ignore[index]
    rows = []
    for (kind, dev, _), test, difference in zip(entrants, tests, differences, strict=True):
        rows.append(
            Row(
                name=dev.subject,
                kind=kind,
                dev={"score": dev.score, "questions": dev.questions},
                test=comparison.score(test),
                against_best_rival=difference,
                parameters=dict(dev.parameters),
                tasks=by_task(group_scores(archive, dev), group_scores(archive, test)),
                retention=comparison.retention(test, seed_on_test),
                below_floor=comparison.below_floor(test, seed_on_test),
                shrinkage=shrinkage(dev, test, seed),
            )
        )
    discovered = [row for row in rows if row.kind == "discovered" and row.test]
    return {
        "best": next((row.name for row in rows if row.kind == "discovered"), None),
        "best_rival": None if rival is None else rival.subject,
        "best_on_test": max(discovered, key=lambda r: r.test["score"]).name if discovered else None,  # type: ignore[index]
        "headline": _headline(rows, None if rival is None else rival.subject),
        "table": [asdict(row) for row in rows],
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
    for group, loss in best.below_floor.items():
        points += f"; it loses {100 * loss:.1f} points on {group} against the seed, more than its floor"
    if difference["low"] > 0:
        return f"{best.name} beats {rival}, the best rival on development: {points}"
    if difference["high"] < 0:
        return f"{best.name} loses to {rival}, the best rival on development: {points}"
    return f"no difference shown between {best.name} and {rival}, the best rival on development: {points}"
