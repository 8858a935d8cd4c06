"""What a process needs that works on a run's folder: the folder for itself, limits, and errors that say the way out."""

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import selfdev
from selfdev.archive import ARCHIVE, Archive, ArchiveError, Run
from selfdev.config import Config
from selfdev.errors import Halted, Interrupted, SelfdevError, UserError
from selfdev.lock import held
from selfdev.sandbox import SandboxUnavailable


def machine_facts(unsafe_sandbox: bool) -> dict[str, Any]:
    """What a run stands on beside its models and its task."""
    import peft  # here, since whoever only shows a run need not wait for them
    import torch
    import transformers

    return {
        "versions": {
            "selfdev": selfdev.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "unsafe_sandbox": unsafe_sandbox,
    }


@contextmanager
def archived(
    folder: Path, preset: str, config: Config, facts: Mapping[str, Any], began: float, *, again: bool = False
) -> Iterator[Archive]:
    """The archive of a folder, opened, or made where there is none; the session's time is counted towards it.

    Args:
        folder: of the run or transfer.
        preset: what it is by.
        config: by which it begins, or goes on where it was changed.
        facts: what it stands on, which must be what it began with.
        began: when the session began, by `time.monotonic`.
        again: take back its verdict.

    Raises:
        ArchiveError: it cannot be opened, or something has changed since it began.
    """
    path, settings = folder / ARCHIVE, config.model_dump(mode="json")
    if path.exists():
        archive = Archive.open(path)
    else:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        archive = Archive.create(
            path, Run(folder.name, preset, config.seed, "running", settings, dict(facts), created)
        )
    with archive:
        try:
            archive.check_facts(facts)
            archive.set_config(settings)
            if again:
                archive.reopen()
            yield archive
        finally:
            archive.add_seconds(time.monotonic() - began)


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
    """Hold the run's folder against a second process; the kernel lets go of it however this one ends.

    A folder in which nothing was begun is not left behind.
    """
    new = not folder.exists()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work on this run; wait for it, or stop it"
            ) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --out") from error
        try:
            yield
        finally:
            if new and not (folder / ARCHIVE).exists():  # nothing in it is paid for before
                shutil.rmtree(folder, ignore_errors=True)
