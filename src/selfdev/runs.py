"""A run: started, and resumed.

A run is a folder: `archive.db`, `adapters/` with what the factory learned, `transfers/`, a `lock`, and, where a server
writes, `written.db` and `served/` with the adapters that it was given.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from selfdev.algorithms.screening import Screen
from selfdev.archive import ARCHIVE, Archive
from selfdev.config import Config, change_config, parse_config
from selfdev.cycle import Cycle
from selfdev.errors import UserError
from selfdev.evaluation.evaluator import Evaluator
from selfdev.evaluation.objective import Objective
from selfdev.factory.endpoint import EndpointFactory
from selfdev.factory.factory import LocalFactory
from selfdev.factory.training import check_backend
from selfdev.merging.relatives import find_relatives
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.device import Place
from selfdev.results import TRANSFER, Run
from selfdev.roles import Factory
from selfdev.sandbox import Sandbox
from selfdev.session import alone, archived, machine_facts, told
from selfdev.watcher import Silent, Watcher

ADAPTER_SPACE = 1024**3
"""Bytes that must be free for models and adapters."""


def run(
    config: Config,
    out: Path | str | None = None,
    *,
    preset: str = "",
    factory: Factory | None = None,
    watch: Watcher | None = None,
    unsafe_sandbox: bool = False,
) -> Run:
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
    if not isinstance(config, Config):
        raise UserError(f"a run is given by its config, selfdev.load_config({str(config)!r}) for example")
    folder = Path("runs") / f"{config.name}-{config.seed}" if out is None else Path(out)
    if (folder / ARCHIVE).exists():
        raise UserError(
            f"{folder} holds a run already; `selfdev resume {folder}` goes on with it, or choose another --out"
        )
    _check_space(folder)
    return _carry_out(folder, config, preset, factory, watch or Silent(), unsafe_sandbox)


def resume(
    folder: Path | str,
    *,
    changes: Sequence[str] = (),
    factory: Factory | None = None,
    watch: Watcher | None = None,
    unsafe_sandbox: bool = False,
    again: bool = False,
) -> Run:
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
    folder = Path(folder)
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
        if changes:
            raise UserError(
                f"{folder} is done, and --set changes nothing of it; leave it out, or begin another run"
            )
        return Run(folder)
    if changes:
        config = change_config(config, changes, str(folder))
    return _carry_out(folder, config, record.preset, factory, watch or Silent(), unsafe_sandbox, again)


def _carry_out(
    folder: Path,
    config: Config,
    preset: str,
    factory: Factory | None,
    watch: Watcher,
    unsafe_sandbox: bool,
    again: bool = False,
) -> Run:
    began = time.monotonic()
    task = config.load_task()
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
            box = stack.enter_context(
                Sandbox(config.jail.limits, unsafe=unsafe_sandbox, workers=config.jail.workers)
            )
            tick(1, 4, "seed and experts")
            found = find_relatives(config.merge.seed, config.merge.experts)
            vectors = read_task_vectors(found.seed, found.experts, config.merge.targets)
            scorer = Evaluator(
                found.seed,
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
        facts = {
            "factory": factory.facts,
            "seed": found.seed_hash,
            "experts": found.expert_hashes,
            "task": task.fingerprint,
            **devices,
            **machine_facts(unsafe_sandbox),
        }
        archive = stack.enter_context(
            archived(folder, preset or config.name, config, facts, began, again=again)
        )
        Cycle(config, archive, factory, screen, scorer, watch, folder).run()
    return Run(folder)


def _factory(config: Config, folder: Path) -> Factory:
    return LocalFactory(config) if config.factory.endpoint is None else EndpointFactory(config, folder)


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
