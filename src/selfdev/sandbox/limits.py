"""How much of the machine one jailed child may use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Budgets of one jailed child, which runs one program on one chunk of tensors.

    Attributes:
        wall_seconds: wall-clock seconds from the moment when the child's layers stand until it is killed.
        cpu_seconds: processor seconds of the child, rounded up to whole ones, with one more of grace.
        memory_bytes: address space, and writable private memory, in bytes above what the child occupies
            before the program is read (interpreter, torch and the mapped tensors; an absolute limit would
            fail every program on builds of torch with a large base size).
        source_bytes: longest accepted source in bytes of UTF-8. Parsing is superlinear in time and memory.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 2 * 1024**3
    source_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        for name in ("wall_seconds", "cpu_seconds", "memory_bytes", "source_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits.{name} is {getattr(self, name)!r}; it must be above 0")
