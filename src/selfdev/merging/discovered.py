"""Programs that runs discovered, as algorithms for checkpoints, with the evidence that the archive holds for them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdev.archive import ARCHIVE, FACTOR, Archive, ArchiveError, Candidate, Evaluation, in_nats
from selfdev.config import Config, parse_config
from selfdev.errors import UserError
from selfdev.merging.algorithm import Algorithm, Found, JailedProgram, Origin, jail
from selfdev.streams import stream_seed


@dataclass(frozen=True)
class Discovered:
    """A program that works, and what its run knows of it.

    Attributes:
        candidate: the program.
        config: the run's.
        origin: for a model card: a title, its source, the evidence.
        factor: the scale at which it was best on development.
    """

    candidate: Candidate
    config: Config
    origin: Origin
    factor: float

    @property
    def stream(self) -> tuple[str | int, ...]:
        """What the random seeds of its calls are for, in the run's seed; the tensor's name follows."""
        return "merge", self.candidate.iteration, self.candidate.number


def load_candidate(run: Path, name: str) -> Discovered:
    """Read a program that a run wrote.

    Args:
        run: folder of the run, finished or not.
        name: of the candidate, such as `learning/2/017`.

    Raises:
        UserError: no such run or candidate, or one that does not work.
    """
    try:
        with Archive.open(run / ARCHIVE, read_only=True) as archive:
            candidate = archive.candidate(name)
            if candidate is None:
                raise UserError(f"{run} has no candidate '{name}'; `selfdev show {run}` names the best")
            config = parse_config(archive.run.config, str(run))
            best = _best(archive, name)
            evidence = _evidence(archive, config, candidate, best)
            factor = _factor(archive, name, best)
    except ArchiveError as error:
        raise UserError(str(error)) from error
    if candidate.source is None or candidate.status == "failed":
        raise UserError(f"candidate '{name}' of {run} does not work ({candidate.failure}); choose another")
    title = f"candidate `{name}` of the run `{run.resolve().name}`, written by {config.factory.model}"
    if factor != 1:
        title += f", at {factor:g} times its scale"
    return Discovered(candidate, config, Origin(title, candidate.source, evidence), factor)


def find_candidate(run: Path, name: str, parameters: Mapping[str, Any]) -> Found:
    """A program that a run wrote, with the scale and the random seeds it had when it was scored.

    Args:
        run: folder of the run, finished or not.
        name: of the candidate.
        parameters: none are taken.

    Raises:
        UserError: as `load_candidate`, and for a parameter.
    """
    found = load_candidate(run, name)
    config = found.config
    if parameters:
        raise UserError(
            f"candidate '{name}' takes no parameters, since its constants are part of it; leave -p out"
        )

    def seed_of(tensor: str) -> int:
        return stream_seed(config.seed, *found.stream, tensor)

    @contextmanager
    def opened(experts: int, largest: int) -> Iterator[Algorithm]:
        with jail(config.jail.limits, experts, largest) as box:
            yield JailedProgram(found.origin, box, seed_of, found.factor)

    return Found(config.merge.targets, opened)


def _table(archive: Archive) -> list[dict[str, Any]]:
    """The verdict's, empty before it."""
    return list((archive.verdict() or {"table": []})["table"])


def _best(archive: Archive, name: str) -> Evaluation | None:
    """The program's highest score on development; in a transfer, which scores no program there, on test."""
    tried = archive.evaluations("candidate", name) + archive.evaluations("scaled", name)
    tried = tried or archive.evaluations(subject=name, split="test")
    return max((e for e in tried if e.score is not None), key=lambda e: e.score or 0.0, default=None)


def _factor(archive: Archive, name: str, best: Evaluation | None) -> float:
    """The scale that a program is applied at: the verdict's, which minds floors, or that of its highest score."""
    for row in _table(archive):
        if row["name"] == name:
            return float(row["parameters"].get(FACTOR, 1.0))
    return 1.0 if best is None else best.factor


def _evidence(archive: Archive, config: Config, candidate: Candidate, best: Evaluation | None) -> list[str]:
    """A table of what the run measured: the candidate, the seed and the rivals, and what the scores rest on."""
    table = _table(archive)
    nats = in_nats([*(row["dev"]["score"] for row in table), None if best is None else best.score])
    shown = [row for row in table if row["name"] == candidate.name or row["kind"] in ("seed", "rival")]
    lines = [
        f"Task `{config.task.name}`, seed `{config.merge.seed}`, experts "
        + ", ".join(f"`{name}={source}`" for name, source in config.merge.experts.items())
        + ". Scores hold for these models; on others they are unknown. They are "
        + ("log-likelihoods in 0.01 nats a token." if nats else "right answers in %."),
        "",
        f"| what | kind | development | test | {100 * config.verdict.level:g} % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in shown:
        test = row["test"]
        interval = f"{100 * test['low']:.1f} to {100 * test['high']:.1f}" if test else ""
        score = f"{100 * test['score']:.1f} ({test['questions']} questions)" if test else ""
        dev = row["dev"]
        dev = "" if dev["score"] is None else f"{100 * dev['score']:.1f} ({dev['questions']} questions)"
        lines.append(f"| {row['name']} | {row['kind']} | {dev} | {score} | {interval} |")
    if candidate.name not in {row["name"] for row in shown}:
        score = "" if best is None else f"{100 * (best.score or 0.0):.1f} ({best.questions} questions)"
        lines.append(f"| {candidate.name} | {candidate.status} | {score} | | |")
    weights = archive.run.facts.get("seed")
    if weights:
        lines += ["", f"The run's seed had weights of sha256 `{weights}`."]
    return lines
