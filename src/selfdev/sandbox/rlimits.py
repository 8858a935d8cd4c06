"""Resource limits of one jailed child.

Memory takes two limits. RLIMIT_AS bounds what is mapped, but libraries, of hundreds of megabytes, are mapped
already, and who unmaps them may map as much of their own. RLIMIT_DATA bounds what is writable and private. It
does not count shared mappings and growing stacks, nor surely what is made writable later; the system-call
filter refuses those, and RLIMIT_STACK bounds the one stack that is there.

Stops: memory, processor time, files and core dumps beyond the budget. Does not stop: copies of what was
    writable when the limits came (the forkserver's own data and the mapped inputs), wall-clock time (the
    parent kills at the deadline) and, for root, new processes (RLIMIT_NPROC does not bind root; the
    system-call filter refuses clone).
"""

import math
import resource

_SPARE_DESCRIPTORS = 16
_STACK_BYTES = 8 * 1024**2  # what most systems give


def occupied() -> tuple[int, int]:
    """Bytes that this process has mapped now, and how many of them are its own to write to."""
    with open("/proc/self/statm", "rb") as statm:
        size, _, _, _, _, data, _ = map(int, statm.read().split())
    return size * resource.getpagesize(), data * resource.getpagesize()


def restrict(memory_bytes: int | None, cpu_seconds: float, *, spent: float = 0.0) -> None:
    """Limit this process for good.

    Args:
        memory_bytes: address space, and writable private memory, above what is occupied now, tensors mapped
            already; None leaves memory unbounded.
        cpu_seconds: processor time from the fork on; SIGXCPU then, SIGKILL one second later.
        spent: processor seconds that do not count, which a process that was not just forked has used before.

    Raises:
        OSError: where a limit cannot be set.
    """
    seconds = math.ceil(cpu_seconds) + math.ceil(spent)
    if memory_bytes is not None:
        mapped, own = occupied()
        _limit(resource.RLIMIT_AS, mapped + memory_bytes)
        _limit(resource.RLIMIT_DATA, own + memory_bytes)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES)
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
