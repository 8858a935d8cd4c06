"""The verdict: what the run found, on questions that nothing before has seen.

Before the test split is opened, two things are fixed and archived: the new program that is best on development and
the rival that is best on development. Their paired difference on test is the headline. The other finalists, all
rivals at their tuned best, the controls' best and the seed meet the same questions, once. Where the best on test is
shown, that is a selection on test and labelled so.

Which part of the gain over the seed is sampling and which is learning, the controls tell: each one's best program on
development is compared with the discovered one, paired by question (`gains`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selfdev.archive import Archive, ArchiveError, Candidate, Evaluation, in_nats
from selfdev.config import Config
from selfdev.evaluation.comparison import Comparison, by_task, group_scores, shrinkage
from selfdev.evaluation.evaluator import Scorer, score_again
from selfdev.evaluation.rivals import best_of, best_rival
from selfdev.evaluation.standing import LEARNING, pareto, ranked_new
from selfdev.evaluation.statistics import holm
from selfdev.watcher import Tick


@dataclass(frozen=True)
class Entrant:
    """Somebody who is measured on test.

    Attributes:
        kind: of the row.
        dev: what is known from before: the setting of a rival, the scale of a program, the score on development.
        candidate: the program, if it is one.
    """

    kind: str
    dev: Evaluation
    candidate: Candidate | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What the same entrant's evaluation on test is archived under."""
        return self.dev.kind, self.dev.subject, self.dev.number


@dataclass(frozen=True)
class Row:
    """One line of the verdict's table, as `selfdev show --json` prints it.

    Attributes:
        name: seed, method or candidate.
        kind: `seed`, `rival`, `control` or `discovered`.
        dev: score on development and the number of questions; no score and 0 where development played no part.
        test: score on test, the number of questions and the interval of the score; None where it could not be measured.
        against_best_rival: paired difference on test from the rival that was best on development; None for that
            rival itself and where nothing was measured.
        parameters: of a rival; of a program its scale, and what `selfdev.evaluation.evaluator` notes of it.
        tasks: score of each group on development and on test.
        retention: difference from the seed on test for each group, with its interval; empty for the seed.
        below_floor: groups on which it loses more on test than the run allows, and how much it loses.
        shrinkage: how much of its gain on the seed was lost from development to test.
        failure: why there is no score on test.
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
    failure: str | None


def finalists(archive: Archive, config: Config) -> list[Entrant]:
    """The best program of every control, and the best new ones of the learning arm; in each, best first."""
    entrants = [
        Entrant("control", dev, program)
        for control in config.controls
        for program, dev in ranked_new(archive, control)[:1]
    ]
    best = ranked_new(archive, LEARNING)[: config.verdict.finalists]
    return entrants + [Entrant("discovered", dev, program) for program, dev in best]


def reach_verdict(
    archive: Archive, config: Config, scorer: Scorer, entrants: Sequence[Entrant], tick: Tick
) -> None:
    """Open the test split, measure everybody on it, and archive the comparison; goes on where it was cut off.

    What is archived is a dict of `best` (name of the discovered program, or None), `best_rival`, `table` (rows in the
    order of `Row`'s kinds), `headline` (a sentence), `best_on_test` (a selection on test) and `gains` (see `_gains`).

    Args:
        archive: seals the split; what the headline compares is fixed in it before. Nothing is left to be done in it
            but this.
        config: the run's.
        scorer: merges and scores.
        entrants: the programs, in the order of the table; the first discovered one is the headline's. The seed and the
            rivals come before them.
        tick: progress.
    """
    archive.set_status("verdict")
    best = next((each.dev.subject for each in entrants if each.kind == "discovered"), None)
    rival = best_rival(archive)
    _fix(archive, best, rival)
    everybody = [*_seed_and_rivals(archive, config), *entrants]
    scorer.open_test(config.task.test, archive)
    archive.set_questions("test", [(q.id, q.group) for q in scorer.questions("test")])
    measured = {(e.kind, e.subject, e.number): e for e in archive.evaluations(split="test")}
    for done, entrant in enumerate(everybody):
        tick(done, len(everybody), "")
        if entrant.key not in measured:
            measured[entrant.key] = _measure(scorer, entrant)
            archive.add_evaluation(measured[entrant.key])
    tick(len(everybody), len(everybody), "")
    comparison = Comparison.of(archive, config, scorer.families("test"))
    archive.set_verdict(_compare(archive, comparison, everybody, measured, rival))


def _fix(archive: Archive, best: str | None, rival: Evaluation | None) -> None:
    """Write down what the headline compares, or find the same written down before.

    Raises:
        ArchiveError: another comparison was fixed, by a version of this package that ranked otherwise.
    """
    compared = {"best": best, "best_rival": None if rival is None else [rival.subject, rival.number]}
    archive.fix_verdict(compared | {"pareto": pareto(archive, LEARNING)})
    fixed = archive.fixed() or {}
    for key, now in compared.items():
        if fixed.get(key) != now:
            raise ArchiveError(
                f"{key} was fixed as {fixed.get(key)!r} before the test split was opened, and would be {now!r} now: "
                "this version ranks otherwise. Go on with the version that began the run"
            )


def _seed_and_rivals(archive: Archive, config: Config) -> list[Entrant]:
    """The seed, and every rival with its best setting on development."""
    entrants = [Entrant("seed", dev) for dev in archive.evaluations("seed")]
    for name in config.rivals:
        # Where no setting keeps the floors, the best of all is measured, and the table says what it loses.
        tuned = best_rival(archive, name) or best_of(archive.evaluations("rival", name))
        if tuned is not None:
            entrants.append(Entrant("rival", tuned))
    return entrants


def _measure(scorer: Scorer, entrant: Entrant) -> Evaluation:
    dev = entrant.dev
    if entrant.candidate is not None:
        return score_again(scorer, entrant.candidate, "test", dev.number, dev.factor)
    if dev.kind == "seed":
        return scorer.seed("test")
    return scorer.rival(dev.subject, dev.number, dev.parameters, "test")


def _compare(
    archive: Archive,
    comparison: Comparison,
    entrants: list[Entrant],
    measured: dict[tuple[str, str, int], Evaluation],
    rival: Evaluation | None,
) -> dict[str, Any]:
    tests = [measured[entrant.key] for entrant in entrants]
    against = None if rival is None else measured.get((rival.kind, rival.subject, rival.number))
    seed = next((pair for pair in zip(entrants, tests, strict=True) if pair[0].kind == "seed"), None)
    seed_on_test = None if seed is None else seed[1]
    differences = [comparison.difference(test, against) for test in tests]
    # Holm over the finalists: several discoveries are tested against one rival.
    finalists = [i for i, entrant in enumerate(entrants) if entrant.kind == "discovered" and differences[i]]
    adjusted = holm([differences[i]["p"] for i in finalists])  # type: ignore[index]
    for i, p in zip(finalists, adjusted, strict=True):
        differences[i]["p_adjusted"] = p  # type: ignore[index]
    rows = []
    for entrant, test, difference in zip(entrants, tests, differences, strict=True):
        dev = entrant.dev
        rows.append(
            Row(
                name=dev.subject,
                kind=entrant.kind,
                dev={"score": dev.score, "questions": dev.questions},
                test=comparison.score(test),
                against_best_rival=difference,
                parameters=dict(dev.parameters),
                tasks=by_task(group_scores(archive, dev), group_scores(archive, test)),
                retention=comparison.retention(test, seed_on_test),
                below_floor=comparison.below_floor(test, seed_on_test),
                shrinkage=shrinkage(dev, test, None if seed is None else (seed[0].dev, seed[1])),
                failure=test.failure,
            )
        )
    discovered = [row for row in rows if row.kind == "discovered" and row.test]
    return {
        "best": next((row.name for row in rows if row.kind == "discovered"), None),
        "best_rival": None if rival is None else rival.subject,
        "best_on_test": max(discovered, key=lambda r: r.test["score"]).name if discovered else None,  # type: ignore[index]
        "headline": _headline(
            rows, None if rival is None else rival.subject, invented=bool(pareto(archive, LEARNING))
        ),
        "gains": _gains(comparison, entrants, tests, seed_on_test),
        "table": [asdict(row) for row in rows],
    }


def _gains(
    comparison: Comparison, entrants: list[Entrant], tests: list[Evaluation], seed: Evaluation | None
) -> dict[str, Any] | None:
    """What the discovered program and each control's best gain over the seed on test, and how these differ.

    Every program was best of its arm on development, and every difference has its interval and p value, which say how
    it varies with the questions: what the same arms would find in another run, they do not say. None where nothing
    was discovered or it could not be measured.
    """
    programs = [
        (entrant.kind, entrant.candidate, test)
        for entrant, test in zip(entrants, tests, strict=True)
        if entrant.candidate is not None
    ]
    best, mine = next(
        ((candidate, test) for kind, candidate, test in programs if kind == "discovered"), (None, None)
    )
    if best is None or mine is None or mine.outcomes is None:
        return None
    return {
        "candidate": best.name,
        "iteration": best.iteration + 1,
        "over_seed": comparison.difference(mine, seed),
        "controls": [
            {
                "arm": control.arm,
                "candidate": control.name,
                "over_seed": comparison.difference(test, seed),
                "best_minus_control": comparison.difference(mine, test),
            }
            for kind, control, test in programs
            if kind == "control"
        ],
    }


def _headline(rows: list[Row], rival: str | None, *, invented: bool) -> str:
    """The sentence; `invented` says whether there are new programs, whatever they lose."""
    best = next((row for row in rows if row.kind == "discovered"), None)
    if best is None:
        found = "no new program keeps the run's floors" if invented else "no new program was found"
        return f"{found}: nothing to compare"
    if rival is None:
        return f"{best.name}: there is no rival to compare with"
    if best.test is None:
        return f"{best.name} could not be measured on test"
    difference = best.against_best_rival
    if difference is None:
        return f"{best.name} has nothing to compare with: {rival}, the best rival on development, could not be measured"
    unit = "hundredths of a nat a token" if in_nats([best.test["score"]]) else "points"
    points = (
        f"{100 * difference['difference']:+.1f} {unit} on test, {100 * difference['level']:.0f} % interval "
    )
    points += f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"
    for group, loss in best.below_floor.items():
        points += f"; it loses {100 * loss:.1f} {unit} on {group} against the seed, more than its floor"
    if difference["low"] > 0:
        return f"{best.name} beats {rival}, the best rival on development: {points}"
    if difference["high"] < 0:
        return f"{best.name} loses to {rival}, the best rival on development: {points}"
    return f"no difference shown between {best.name} and {rival}, the best rival on development: {points}"
