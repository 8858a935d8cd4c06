"""A run: started, resumed, and read.

A run is a folder: `archive.db`, `adapters/` with what the factory learned, and `written.db` where a server writes.
"""

import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import selfdev
from selfdev.algorithms.screening import Screen
from selfdev.archive import Archive, ArchiveError, Candidate
from selfdev.archive import Run as RunRecord
from selfdev.config import Config, change_config, parse_config
from selfdev.cycle import Cycle
from selfdev.errors import Halted, Interrupted, SelfdevError, UserError
from selfdev.evaluation.diversity import diversity
from selfdev.evaluation.evaluator import DISTANCE, ORDER, Evaluator
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.objective import Objective
from selfdev.evaluation.standing import LEARNING, is_written, pareto, ranked_new, repairs_of, scores_on_first
from selfdev.evaluation.tasks import load_task
from selfdev.factory.endpoint import EndpointFactory
from selfdev.factory.factory import LocalFactory
from selfdev.factory.prompt import base_of
from selfdev.factory.training import check_backend
from selfdev.lock import held
from selfdev.merging.compatibility import check_distinct
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.device import Place
from selfdev.models.folder import weights_hash
from selfdev.models.sources import resolve
from selfdev.roles import Factory
from selfdev.sandbox import Limits, Sandbox, SandboxUnavailable
from selfdev.watcher import Silent, Watcher

ARCHIVE = "archive.db"
TRANSFER = "transfer"
"""Among the facts of an archive that is a transfer's and no run's; see `selfdev.transfers`."""
ADAPTER_SPACE = 1024**3
"""Bytes that must be free for models and adapters."""


def run(
    config: Config,
    out: Path | None = None,
    *,
    preset: str = "",
    factory: Factory | None = None,
    watch: Watcher | None = None,
    unsafe_sandbox: bool = False,
) -> "Run":
    """Start a run and carry it to its verdict.

    Args:
        config: what to run.
        out: its folder, which must not hold a run; runs/NAME-SEED by default.
        preset: where the config came from, for the archive.
        factory: who writes and learns; by default the model that the config names, in this process.
        watch: is told what happens.
        unsafe_sandbox: leave the jail out and run model-written code with resource limits alone.

    Raises:
        UserError: the folder, a model or a setting cannot be used; nothing has been started.
        Interrupted: Ctrl-C; `resume` goes on.
    """
    folder = out or Path("runs") / f"{config.name}-{config.seed}"
    if (folder / ARCHIVE).exists():
        raise UserError(
            f"{folder} holds a run already; `selfdev resume {folder}` goes on with it, or choose another --out"
        )
    _check_space(folder)
    return _carry_out(folder, config, preset, factory, watch or Silent(), unsafe_sandbox)


def resume(
    folder: Path,
    *,
    changes: Sequence[str] = (),
    factory: Factory | None = None,
    watch: Watcher | None = None,
    unsafe_sandbox: bool = False,
    again: bool = False,
) -> "Run":
    """Go on with a run that was interrupted or killed; of a finished one, nothing is left to do.

    Args:
        folder: of the run.
        changes: `KEY=VALUE` each, kept for good; of the fields that do not decide what is written, such as
            `factory.endpoint.tokens_budget`.
        factory: as in `run`.
        watch: as in `run`.
        unsafe_sandbox: as in `run`.
        again: open the test split of a finished run once more and measure everybody anew. The archive marks the
            opening and keeps the result that stood before it.

    Raises:
        UserError: the folder holds no run that can be read, or what it stands on has changed; or the run has not
            come to its verdict, which then cannot be reached again.
        Interrupted: Ctrl-C.
    """
    with told(folder), Archive.open(folder / ARCHIVE, read_only=True) as archive:
        record = archive.run
        if again:
            archive.check_reached()
    if TRANSFER in record.facts:
        raise UserError(
            f"{folder} is a transfer and no run: to go on with it, give the `selfdev transfer` command again; "
            f"`selfdev show {folder}` shows it"
        )
    config = parse_config(record.config, str(folder))
    if record.status == "done" and not again:
        return Run(folder)
    if changes:
        config = change_config(config, changes, str(folder))
        with told(folder), alone(folder), Archive.open(folder / ARCHIVE) as archive:
            archive.set_config(config.model_dump(mode="json"))
    return _carry_out(folder, config, record.preset, factory, watch or Silent(), unsafe_sandbox, again)


def open_run(folder: Path | str) -> "Run":
    """Read a run.

    Raises:
        UserError: the folder holds no run that can be read.
    """
    return Run(Path(folder))


def _carry_out(
    folder: Path,
    config: Config,
    preset: str,
    factory: Factory | None,
    watch: Watcher,
    unsafe_sandbox: bool,
    again: bool = False,
) -> "Run":
    began = time.monotonic()
    place = Place.of(config.task.device, config.task.dtype, "task.device")
    devices = {"task.device": str(place)}
    if factory is None and config.factory.weights_here:
        writes = Place.of(config.factory.device, config.factory.dtype, "factory.device")
        devices["factory.device"] = str(writes)
        check_backend(config.refinement, writes.device)
    with ExitStack() as stack:
        stack.enter_context(told(folder, " --unsafe-sandbox" if unsafe_sandbox else ""))
        stack.enter_context(alone(folder))
        with watch.phase("models") as tick:
            tick(0, 4, "jail")
            box = stack.enter_context(Sandbox(jail_limits(config), unsafe=unsafe_sandbox))
            tick(1, 4, "seed and experts")
            seed = resolve(config.merge.seed)
            experts = {name: resolve(source) for name, source in config.merge.experts.items()}
            weights, hashes = weights_hash(seed), {name: weights_hash(path) for name, path in experts.items()}
            check_distinct(weights, hashes)
            vectors = read_task_vectors(seed, experts, config.merge.targets)
            task = load_task(config.task.name)
            scorer = Evaluator(
                seed,
                vectors,
                task,
                config.task.development,
                box,
                config.seed,
                Objective(config.task.weights),
                place=place,
            )
            scorer.check_test(config.task.test)
            tick(2, 4, f"factory {config.factory.model}")
            factory = factory or _factory(config, folder)
            tick(3, 4, "known methods on the probes")
            screen = Screen(box)
            tick(4, 4, "")
        with watch.phase("warm start") as tick:
            factory.prepare(tick)
        archive = stack.enter_context(_open_or_create(folder, config, preset))
        stack.callback(lambda: archive.add_seconds(time.monotonic() - began))
        archive.check_facts(
            {
                "factory": factory.facts,
                "seed": weights,
                "experts": hashes,
                "task": task.fingerprint,
                **devices,
                **machine_facts(unsafe_sandbox),
            }
        )
        if again:
            archive.reopen()
        Cycle(config, archive, factory, screen, scorer, watch, folder).run()
    return Run(folder)


def jail_limits(config: Config) -> Limits:
    """What each jailed program of a run may use."""
    return Limits(
        wall_seconds=config.jail.wall_seconds,
        cpu_seconds=2 * config.jail.wall_seconds + 1,  # never first: one loop, one class of failure
        memory_bytes=config.jail.memory_mb * 1000**2,
    )


def machine_facts(unsafe_sandbox: bool) -> dict[str, Any]:
    """What a run stands on beside its models and its task."""
    return {
        "versions": {
            "selfdev": selfdev.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "unsafe_sandbox": unsafe_sandbox,
    }


def _factory(config: Config, folder: Path) -> Factory:
    return LocalFactory(config) if config.factory.endpoint is None else EndpointFactory(config, folder)


def _open_or_create(folder: Path, config: Config, preset: str) -> Archive:
    if (folder / ARCHIVE).exists():
        return Archive.open(folder / ARCHIVE)
    record = RunRecord(
        name=folder.name,
        preset=preset or config.name,
        seed=config.seed,
        status="running",
        config=config.model_dump(mode="json"),
        facts={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Archive.create(folder / ARCHIVE, record)


def _check_space(folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, and the run's folder would lie in it; choose another --out")
    free = shutil.disk_usage(folder).free
    if free < ADAPTER_SPACE:
        raise UserError(
            f"{folder}: {free / 1e6:.0f} MB are free and a run wants {ADAPTER_SPACE / 1e6:.0f} MB; "
            "make room or choose another --out"
        )


@contextmanager
def told(folder: Path, flags: str = "", go_on: str = "") -> Iterator[None]:
    """What archive, jail and keyboard raise, as errors that tell the user the way out.

    Args:
        folder: of the run.
        flags: that `selfdev resume` must be given too.
        go_on: how to go on, where it is not by `selfdev resume`.
    """
    go_on = go_on or f"selfdev resume {folder}{flags}"
    try:
        yield
    except ArchiveError as error:
        raise UserError(str(error)) from error
    except SandboxUnavailable as error:
        raise SelfdevError(
            f"{error}\nModel-written code runs in the jail or not at all; `selfdev doctor` says what is missing. "
            "--unsafe-sandbox leaves the jail out and goes on with resource limits alone."
        ) from error
    except Halted as error:
        raise Interrupted(f"{error}\nWhat is written is kept. Go on with: {go_on}") from error
    except KeyboardInterrupt:
        if not (folder / ARCHIVE).exists():
            raise Interrupted("stopped before the run began; there is nothing to resume") from None
        raise Interrupted(f"stopped; nothing is lost. Go on with: {go_on}") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run's folder against a second process; the kernel lets go of it however this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work on this run; wait for it, or stop it"
            ) from None
        yield


class Run:
    """A view of a run's folder, finished or not.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with told(folder):
            self.archive = Archive.open(folder / ARCHIVE, read_only=True)

    @cached_property
    def config(self) -> Config:
        """What it runs."""
        return parse_config(self.archive.run.config, str(self.folder))

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What the final test said; None before."""
        reached = self.archive.verdict()
        return None if reached is None else reached[1]

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
            "iterations": [
                self._iteration(i.arm, i.iteration) for i in self.archive.iterations() if is_written(i.arm)
            ],
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
            "seconds": record.seconds,
            "created": record.created,
            "folder": str(self.folder),
            "warm_start": self.config.factory.warm_start.steps,
            "unsafe_sandbox": bool(record.facts.get("unsafe_sandbox")),
            "test_opened": [opening.opened for opening in openings],
            "test_opened_again": [
                {"opened": o.opened, "headline_before": (o.before or {}).get("headline")}
                for o in openings
                if o.again
            ],
        }

    def _seconds(self, arm: str, t: int) -> dict[str, float]:
        """What an iteration of an arm took; an arm that wrote what another one wrote has that one's time."""
        names = {c.name for c in self.archive.candidates(arm, t)}
        scored = [e for kind in ("candidate", "scaled") for e in self.archive.evaluations(kind)]
        mended = {c.name for c in self.archive.candidates(repairs_of(arm), t)}
        repairs = [i.seconds for i in self.archive.iterations(repairs_of(arm)) if i.iteration == t]
        repairs += [e.seconds for e in scored if e.subject in mended]
        return {
            "writing": sum(i.seconds for i in self.archive.iterations(arm) if i.iteration == t),
            "scoring": sum(e.seconds for e in scored if e.subject in names),
            "learning": sum(repairs + [r.seconds for r in self.archive.refinements(arm) if r.iteration == t]),
        }

    def _iteration(self, arm: str, t: int) -> dict[str, Any]:
        [iteration] = [i for i in self.archive.iterations(arm) if i.iteration == t]
        written = self.archive.candidates(arm, t)
        earlier = [c for c in self.archive.candidates(arm) if c.iteration < t]
        rounds = self.archive.refinements(arm)
        # What a program of a repair turn may have copied is what the usual prompt shows.
        prompts = [iteration.prompts[base_of(text, iteration.prompts)] for text in iteration.prompts]
        first, evidence = scores_on_first(self.archive), Evidence(self.archive)
        scores = [first[c.name] for c in written if c.name in first]
        finished = [e.score for c, e in ranked_new(self.archive, arm, tuned=False) if c.iteration == t]
        count = {
            status: sum(c.status == status for c in written)
            for status in ("trivial", "known", "repeated", "new")
        }
        return {
            "iteration": t + 1,
            "arm": arm,
            "temperature": iteration.temperature,
            "written": len(written),
            "working": sum(count.values()),
            **count,
            "better": sum(evidence.better(c.name) for c in written if c.status == "new"),
            **asdict(diversity(written, earlier, prompts)),
            "evaluated": len(scores),
            "best_dev": finished[0] if finished else None,
            "mean_dev": sum(scores) / len(scores) if scores else None,
            "pairs": len(self.archive.pairs(arm, t)),
            "nothing_learned": next((r.why_nothing for r in rounds if r.iteration == t), None),
            "seconds": self._seconds(arm, t),
        }
