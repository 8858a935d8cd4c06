"""A run as its folder tells it, finished or not."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from selfdev.algorithms.screening import Novelty
from selfdev.archive import ARCHIVE, DISTANCE, ORDER, Archive, Candidate
from selfdev.config import Config, parse_config
from selfdev.errors import UserError
from selfdev.evaluation.diversity import diversity
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.standing import LEARNING, is_written, pareto, ranked_new, repairs_of, scores_on_first
from selfdev.factory.journal import spent_in
from selfdev.factory.prompt import base_of
from selfdev.lock import is_held
from selfdev.session import told

TRANSFER = "transfer"
"""Among the facts of an archive that is a transfer's and no run's; see `selfdev.transfers`."""


def open_run(folder: Path | str) -> "Run":
    """Read a run, or a transfer, which is a `Transfer`.

    Raises:
        UserError: the folder holds no run that can be read.
    """
    folder = Path(folder)
    if not (folder / ARCHIVE).exists() and (inside := sorted(folder.glob(f"*/{ARCHIVE}"))):
        raise UserError(
            f"{folder} holds no run itself; in it lie {', '.join(str(each.parent) for each in inside)}"
        )
    found = Run(folder)
    return Transfer(found.folder) if is_transfer(found) else found


class Run:
    """A view of a run's folder, finished or not.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with told(folder):
            self.archive = Archive.open(folder / ARCHIVE, read_only=True)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.folder}, {self.archive.run.status}>"

    @cached_property
    def config(self) -> Config:
        """What it runs."""
        return parse_config(self.archive.run.config, str(self.folder))

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What the final test said; None before."""
        return self.archive.verdict()

    @property
    def best(self) -> Candidate | None:
        """The new program of the learning arm that is best on development so far; None if there is none."""
        ranked = ranked_new(self.archive, LEARNING)
        return ranked[0][0] if ranked else None

    def candidates(self, arm: str | None = None) -> list[Candidate]:
        """All programs that were written, in that order; with `arm="repaired"` those that nobody wrote."""
        return [c for c in self.archive.candidates(arm) if arm is not None or is_written(c.arm)]

    def candidate(self, name: str) -> Candidate:
        """One program by its name, such as `learning/2/017`.

        Raises:
            UserError: there is none.
        """
        found = self.archive.candidate(name)
        if found is None:
            raise UserError(f"{self.folder} has no candidate '{name}'; they are named like {LEARNING}/1/001")
        return found

    def summary(self) -> dict[str, Any]:
        """All that `selfdev show --json` prints; scores in 0..1."""
        verdict = self.verdict
        best, scored = next(iter(ranked_new(self.archive, LEARNING)), (None, None))
        return {
            "run": self._record(),
            "best": None
            if best is None or scored is None
            else {
                "candidate": best.name,
                "source": best.source,
                "non_trivial": best.status == "new",
                "nearest": best.nearest,
                "distance": best.distance,
                "distance_on_real_tensors": scored.parameters.get(DISTANCE),
                "change_by_order": self._change_by_order(best.name),
                "factor": scored.factor,
            },
            "headline": None if verdict is None else verdict["headline"],
            "best_on_test": None if verdict is None else verdict["best_on_test"],
            "gains": None if verdict is None else verdict.get("gains"),
            "table": [] if verdict is None else verdict["table"],
            "pareto": pareto(self.archive, LEARNING),
            "iterations": self._iterations(),
        }

    def _change_by_order(self, name: str) -> float | None:
        """How much a program's output changes if the experts change places; None where nobody tried."""
        [written] = self.archive.evaluations("candidate", name, split="development")
        changed: float | None = written.parameters.get(ORDER)
        return changed

    def _record(self) -> dict[str, Any]:
        record, openings = self.archive.run, self.archive.openings()
        return {
            "name": record.name,
            "preset": record.preset,
            "seed": record.seed,
            "status": record.status,
            "at_work": is_held(self.folder),
            "seconds": record.seconds,
            "created": record.created,
            "folder": str(self.folder),
            "warm_start": self.config.factory.warm_start.steps,
            "unsafe_sandbox": bool(record.facts.get("unsafe_sandbox")),
            "server": self._server(),
            "test_opened": [opening.opened for opening in openings],
            "test_opened_again": [
                {"opened": o.opened, "headline_before": (o.before or {}).get("headline")}
                for o in openings
                if o.again
            ],
        }

    def _server(self) -> dict[str, Any] | None:
        """What a server has read and written for the run, requests without an answer at their most, and its price."""
        spent, settings = spent_in(self.folder), self.config.factory.endpoint
        if spent is None or settings is None:
            return None
        return {**asdict(spent), "price": settings.price(spent.tokens_in, spent.tokens_out)}

    def _iterations(self) -> list[dict[str, Any]]:
        """What every iteration of every arm came to, sorted by iteration and arm."""
        first, evidence = scores_on_first(self.archive), Evidence(self.archive)
        scoring: dict[str, float] = {}
        for each in self.archive.evaluations("candidate") + self.archive.evaluations("scaled"):
            scoring[each.subject] = scoring.get(each.subject, 0.0) + each.seconds
        found = [
            each
            for arm in dict.fromkeys(i.arm for i in self.archive.iterations() if is_written(i.arm))
            for each in self._of_arm(arm, first, evidence, scoring)
        ]
        return sorted(found, key=lambda each: (each["iteration"], each["arm"]))

    def _of_arm(
        self, arm: str, first: Mapping[str, float], evidence: Evidence, scoring: Mapping[str, float]
    ) -> Iterator[dict[str, Any]]:
        """What an arm's iterations came to.

        Args:
            arm: one that writes.
            first: `scores_on_first` of the run.
            evidence: of the run.
            scoring: seconds by program.
        """
        candidates, repaired = self.archive.candidates(arm), self.archive.candidates(repairs_of(arm))
        ranked = ranked_new(self.archive, arm, tuned=False)
        repairing = {i.iteration: i.seconds for i in self.archive.iterations(repairs_of(arm))}
        rounds = {r.iteration: r for r in self.archive.refinements(arm)}
        for iteration in self.archive.iterations(arm):
            t, learned = iteration.iteration, rounds.get(iteration.iteration)
            written = [c for c in candidates if c.iteration == t]
            # What a program of a repair turn may have copied is what the usual prompt shows.
            prompts = [iteration.prompts[base_of(text, iteration.prompts)] for text in iteration.prompts]
            scores = [first[c.name] for c in written if c.name in first]
            finished = [e.score for c, e in ranked if c.iteration == t]
            count = {str(status): sum(c.status == status for c in written) for status in Novelty}
            mended = sum(scoring.get(c.name, 0.0) for c in repaired if c.iteration == t)
            yield {
                "iteration": t + 1,
                "arm": arm,
                "temperature": iteration.temperature,
                "written": len(written),
                "working": sum(count.values()),
                **count,
                "better": sum(evidence.better(c.name) for c in written if c.status == "new"),
                **asdict(diversity(written, [c for c in candidates if c.iteration < t], prompts)),
                "evaluated": len(scores),
                "best_dev": finished[0] if finished else None,
                "mean_dev": sum(scores) / len(scores) if scores else None,
                "pairs": len(self.archive.pairs(arm, t)),
                "nothing_learned": None if learned is None else learned.why_nothing,
                # Of an arm that wrote what another one wrote it is that one's time.
                "seconds": {
                    "writing": iteration.seconds,
                    "screening": sum(c.screening or 0.0 for c in written),
                    "scoring": sum(scoring.get(c.name, 0.0) for c in written),
                    "learning": repairing.get(t, 0.0)
                    + mended
                    + (0.0 if learned is None else learned.seconds),
                },
            }


class Transfer(Run):
    """A view of a transfer's folder, finished or not; its archive is of the same kind as a run's."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is transferred.

        The run's name and when it was `created`; `programs`, name -> scale; development `evaluations` of each rival;
        and the rivals that are `left_out`, since they merge another number of experts.
        """
        found: Mapping[str, Any] = self.archive.run.facts[TRANSFER]
        return found

    @property
    def best(self) -> Candidate | None:
        """The program that the headline is about: the run's best on development."""
        return self.archive.candidate(next(iter(self.facts["programs"])))

    def summary(self) -> dict[str, Any]:
        """All that `selfdev transfer --json` prints; scores in 0..1."""
        verdict, best, facts = self.verdict, self.best, self.archive.run.facts
        return {
            "run": self._record(),
            TRANSFER: {
                **self.facts,
                "task": self.config.task.name,
                "seed": self.config.merge.seed,
                "experts": dict(self.config.merge.experts),
                "weights": {"seed": facts["seed"], "experts": facts["experts"]},
            },
            "best": None
            if best is None
            else {
                "candidate": best.name,
                "source": best.source,
                "factor": self.facts["programs"][best.name],
            },
            "headline": None if verdict is None else verdict["headline"],
            "best_on_test": None if verdict is None else verdict["best_on_test"],
            "gains": None if verdict is None else verdict.get("gains"),
            "table": [] if verdict is None else verdict["table"],
        }


def is_transfer(run: Run) -> bool:
    """Whether a folder that was opened as a run's is a transfer's."""
    return TRANSFER in run.archive.run.facts
