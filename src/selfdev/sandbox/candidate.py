"""The life of one jailed child, from the fork to its end."""

import mmap
import os
import resource
from typing import NoReturn

from . import layers, program
from .job import EXIT_DONE, READY, read_job

EXIT_NO_LAYER = 70
EXIT_BROKEN = 71


def live(
    job: int, result: int, ready: int, *, forkserver: int, memory_bytes: int, cpu_seconds: float, unsafe: bool
) -> NoReturn:
    """Put on every layer, run the program, and leave. Called right after the fork, never returns.

    Args:
        job: descriptor of the job file.
        result: descriptor of the result file.
        ready: writing end of a pipe. It gets ``READY`` or the reason why a layer is missing, and is closed
            before the source is looked at, so that no program can write to it.
        forkserver: its process id.
        memory_bytes: see `Limits`.
        cpu_seconds: see `Limits`.
        unsafe: resource limits alone.
    """
    try:
        _close_all_but(job, result, ready)
        inputs = mmap.mmap(job, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        outputs = mmap.mmap(result, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        # The mappings stay. mmap objects hold duplicates of the descriptors; they go too.
        _close_all_but(ready)
        _invite_the_oom_killer()
        if unsafe:
            os.setsid()
            layers.install(iter([layers.resource_limits(memory_bytes, cpu_seconds)]))
        else:
            layers.install(layers.full(forkserver, memory_bytes, cpu_seconds))
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, layers.LayerMissing) else f"a child cannot be set up: {error!r}"
        )
        os.write(ready, reason.encode("utf-8", "replace")[:1000])
        os._exit(EXIT_NO_LAYER)
    os.write(ready, READY)
    os.close(ready)
    source, calls = read_job(memoryview(inputs))
    leave = os._exit
    program.run(source, calls, memoryview(outputs))
    leave(EXIT_DONE)


def _close_all_but(*kept: int) -> None:
    """Close every descriptor but 0 to 2, which are /dev/null, and the given ones."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = 2**31 - 1 if limit == resource.RLIM_INFINITY else limit
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, limit)


def _invite_the_oom_killer() -> None:
    """If the machine runs out of memory, this child shall go first and not the user's work."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # a courtesy and no layer: without /proc the resource limits still hold
