"""The life of one child without a jail: a fresh interpreter for one chunk, from its start to its end."""

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import program, system, warmup
from .job import EXIT_DONE, READY, read_job

JOB = "job"
RESULT = "result"

_EXIT_ORPHAN = 72
_ORPHAN_SECONDS = 3.0
"""So long after its deadline a child that nobody killed ends itself: its parent is gone."""


def main(folder: str, memory_bytes: str, cpu_seconds: str, wall_seconds: str) -> NoReturn:
    """Take what limits the system has, run the program, and leave.

    Args:
        folder: holds the job file and the result file.
        memory_bytes: see `Limits`.
        cpu_seconds: see `Limits`.
        wall_seconds: see `Limits`.
    """
    limit = _limiter(int(memory_bytes), float(cpu_seconds))  # now: a warm process can import nothing more
    warmup.warm()
    inputs = _map(Path(folder, JOB), mmap.ACCESS_COPY)
    outputs = _map(Path(folder, RESULT), mmap.ACCESS_WRITE)
    patience = min(float(wall_seconds) + _ORPHAN_SECONDS, threading.TIMEOUT_MAX)
    orphaned = threading.Timer(patience, os._exit, (_EXIT_ORPHAN,))
    orphaned.daemon = True
    orphaned.start()
    limit()
    # Standard error is a pipe to the parent until here; the program finds the null device there.
    null = os.open(os.devnull, os.O_RDWR)
    os.write(2, READY)
    os.dup2(null, 2)
    source, calls = read_job(memoryview(inputs))
    leave = os._exit
    program.run(source, calls, memoryview(outputs))
    leave(EXIT_DONE)


def _map(path: Path, access: int) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def _limiter(memory_bytes: int, cpu_seconds: float) -> Callable[[], None]:
    """What limits this process as far as the system can."""
    if not system.has_resource_limits():
        return lambda: None
    from . import rlimits

    memory = memory_bytes if system.has_memory_limit() else None
    return lambda: rlimits.restrict(memory, cpu_seconds, spent=time.process_time())
