"""Resource limits of one jailed child.

Stops: memory, processor time, files and core dumps beyond the budget. Does not stop: wall-clock time (the
    parent kills at the deadline) and, for root, new processes (RLIMIT_NPROC does not bind root; the
    system-call filter refuses clone).
"""

import math
import resource

_SPARE_DESCRIPTORS = 16


def address_space() -> int:
    """Bytes of address space that this process occupies now."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def restrict(memory_bytes: int, cpu_seconds: float) -> None:
    """Limit this process for good.

    Args:
        memory_bytes: address space above what is occupied now, tensors mapped already.
        cpu_seconds: processor time from the fork on; SIGXCPU then, SIGKILL one second later.

    Raises:
        OSError: where a limit cannot be set.
    """
    seconds = math.ceil(cpu_seconds)
    _limit(resource.RLIMIT_AS, address_space() + memory_bytes)
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _SPARE_DESCRIPTORS)
    for name in ("NPROC", "MEMLOCK", "MSGQUEUE"):
        if hasattr(resource, f"RLIMIT_{name}"):
            _limit(getattr(resource, f"RLIMIT_{name}"), 0)


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    _, ceiling = resource.getrlimit(which)
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:  # a limit that the user has set already may be lower than ours
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))
