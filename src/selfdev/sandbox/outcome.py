"""What came of one call of one program."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class SandboxUnavailable(RuntimeError):
    """The jail cannot be built here. The message names the layer, the reason and the way out."""


class Status(StrEnum):
    """The closed list of ways in which a call can end."""

    OK = "ok"
    """The tensor is there."""
    REJECTED = "rejected"
    """The source is too long, not Python, imports what it may not, or has no `merge_models`."""
    ERROR = "error"
    """The program raised an exception, or says so."""
    TIMEOUT = "timeout"
    """The child was killed at its deadline or ran out of processor time."""
    MEMORY = "memory"
    """The program asked for more memory than its budget, or says so: it can raise MemoryError itself."""
    CRASHED = "crashed"
    """The child died of a signal or left without an answer."""
    BAD_OUTPUT = "bad_output"
    """What the program returned is not a finite real tensor of the right shape."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Attributes:
        status: one of the closed list.
        tensor: float32, of the inputs' shape, finite, in memory of its own; None unless ``ok``.
        failure: a class from a closed list for each status, such as ``SyntaxError``, ``ImportNotAllowed``,
            ``ShapeMismatch``, ``NonFinite``, ``Timeout``, ``OutOfMemory``, ``Signal SIGSEGV``; empty if
            ``ok``. For ``error`` the name of one of Python's built-in exceptions, and ``Exception`` for every
            other class, so that no program can pass its own off as one of ours.
        error: what happened, at most 300 printable ASCII characters without addresses; empty if ``ok``.
        seconds: duration of the call. The child measures it, so a hostile program can forge it between 0 and
            the life of the child; nothing may be decided by it.
    """

    status: Status
    tensor: torch.Tensor | None = None
    failure: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there is a tensor."""
        return self.status is Status.OK
