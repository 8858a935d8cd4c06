"""The command `selfdev`: each command parses, calls one function, and prints.

What takes long to import is imported inside the commands, so that `selfdev --help` answers at once.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 interrupted and resumable.
"""

import errno
import os
import signal
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from selfdev.cli.application import UNSAFE, app
from selfdev.errors import Interrupted, SelfdevError

# isort: off
from selfdev.cli import runs, models, machine  # in the order of the commands in the help
# isort: on

__all__ = ["app", "machine", "main", "models", "runs"]

# Before torch is imported: OpenMP threads that spin at barriers made sampling 8 times slower whenever another
# process used one of the cores (29 s against 3.8 s measured, 2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Libraries that would draw progress bars and print advice into the display.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to programmers; `python -W` brings it back
    mark = _unsafe_mark() if UNSAFE in arguments else ""
    with _interruptible():
        try:
            code = app(args=arguments, prog_name="selfdev", standalone_mode=False) or 0
        except Interrupted as stopped:
            return _say(mark, str(stopped), stopped.exit_code)
        except SelfdevError as error:
            return _say(mark, f"error: {error}", error.exit_code)
        except _UsageError as error:
            what = " ".join(error.format_message().split()).removesuffix(".")
            command = error.ctx.command_path if error.ctx is not None else "selfdev"
            return _say(mark, f"error: {what}; `{command} --help` tells more", 2)
        except (OSError, sqlite3.OperationalError) as error:
            return _say(mark, f"error: {_explain(error)}", 1)
        except (KeyboardInterrupt, typer.Abort):
            code = _STOPPED
        if code == _STOPPED:
            return _say(mark, "stopped before there was anything to resume; give the same command again", 3)
        return int(code)


_STOPPED = 130
"""Typer's exit code for a KeyboardInterrupt, which older versions turn into `typer.Abort`."""

# What typer raises for a wrong command line: click's class, or its own copy of it in newer versions.
_UsageError: Any = typer.BadParameter.__base__


def _unsafe_mark() -> str:
    from selfdev.report.terminal import UNSAFE_MARK

    return UNSAFE_MARK


def _say(mark: str, message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"{mark}{line}", file=sys.stderr)
    return code


def _explain(error: OSError | sqlite3.OperationalError) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
        return (
            "the disk is full; make room, and give the same command again. If it was a run, what is archived is safe: "
            "`selfdev resume RUN` goes on with it"
        )
    return str(error)


_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first Ctrl-C ends the command in order, the second at once: nothing archived is lost by either.

    So does SIGTERM, which schedulers and containers send before they kill.
    """
    before = {number: signal.getsignal(number) for number in _STOPPING}

    def first(number: int, frame: FrameType | None) -> None:
        for each in _STOPPING:
            signal.signal(each, second)
        raise KeyboardInterrupt

    def second(number: int, frame: FrameType | None) -> None:
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # the live display hides the cursor
        os._exit(3)

    try:
        for number in _STOPPING:
            signal.signal(number, first)
    except ValueError:  # not the main thread: whoever runs that one handles its signals
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            for number, handler in before.items():
                signal.signal(number, handler)
