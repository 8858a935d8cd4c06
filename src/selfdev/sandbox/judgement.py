"""From what a dead child left to outcomes. Here the parent meets bytes that a hostile program wrote."""

import builtins
import math
import signal
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch

from .job import EXIT_DONE, Record, ResultLayout, State, is_finite
from .limits import Limits
from .message import clean
from .outcome import Outcome, Status
from .tensor_file import TensorFile

# Their numbers wherever there are signals; Windows has no such names.
SIGKILL = 9
_SIGXCPU = 24

# What a child may say of itself, apart from ok; time-outs and crashes come from the kernel. Both are closed
# lists, so a program's own exception is never called as the jail calls something else, say `Timeout`.
_FAILURES: Mapping[str, Set[str]] = {
    Status.REJECTED: {"SyntaxError", "TooComplex", "ImportNotAllowed", "NoEntryPoint", "WrongSignature"},
    Status.MEMORY: {"OutOfMemory"},
    Status.BAD_OUTPUT: {"NotATensor", "ShapeMismatch", "DtypeMismatch", "DeviceMismatch", "NonFinite"},
}
_EXCEPTIONS = {
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


@dataclass(frozen=True)
class Death:
    """How a child ended, from the kernel and not from the child.

    Attributes:
        exit_code: of the wait status, as `subprocess` gives it: a signal's number below 0 if one ended it.
        cpu_seconds: processor time it used.
        wall_seconds: from the moment when its layers stood to its end.
        killed: whether the parent killed it at its deadline.
    """

    exit_code: int
    cpu_seconds: float
    wall_seconds: float
    killed: bool


def judge(results: TensorFile, layout: ResultLayout, death: Death, limits: Limits) -> list[Outcome]:
    """One outcome for each call of the chunk.

    Time-out and crash are judged by the wait status alone. They are charged to the first call that is not
    done, or to the last one if all are, and to all after it; what was done before stands.
    """
    raw = results.read(len(layout.shapes) * Record.SIZE, 0)
    records = [Record.unpack(raw[i * Record.SIZE : (i + 1) * Record.SIZE]) for i in range(len(layout.shapes))]
    done = next((i for i, record in enumerate(records) if record.state != State.DONE), len(records))
    end = _end(death, limits)
    if end is None and done < len(records):
        end = Outcome(Status.CRASHED, None, "EarlyExit", "left without an answer")
    if end is not None:
        done = min(done, len(records) - 1)
    outcomes = [
        _outcome(record, results, layout.offsets[i], layout.shapes[i], death.wall_seconds)
        for i, record in enumerate(records[:done])
    ]
    for _ in records[done:]:
        assert end is not None
        outcomes.append(end)
    return outcomes


def _end(death: Death, limits: Limits) -> Outcome | None:
    """What the wait status says, or None if the child left as it should."""
    seconds = death.wall_seconds
    if death.exit_code < 0:
        number = -death.exit_code
        if number == SIGKILL and death.killed:
            text = f"no answer within {limits.wall_seconds:g} s"
            return Outcome(Status.TIMEOUT, None, "Timeout", text, seconds)
        out_of_time = death.cpu_seconds >= math.ceil(limits.cpu_seconds)
        if number == _SIGXCPU or (number == SIGKILL and out_of_time):
            text = f"used more than {limits.cpu_seconds:g} s of processor time"
            return Outcome(Status.TIMEOUT, None, "CpuTime", text, seconds)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return Outcome(Status.CRASHED, None, f"Signal {name}", f"killed by {name}", seconds)
    if death.exit_code != EXIT_DONE:
        return Outcome(Status.CRASHED, None, "EarlyExit", f"left with exit code {death.exit_code}", seconds)
    return None


def _outcome(
    record: Record, results: TensorFile, offset: int, shape: tuple[int, ...], wall_seconds: float
) -> Outcome:
    """What a finished call's record says, believed only as far as it can be checked."""
    seconds = min(max(record.seconds, 0.0), wall_seconds) if math.isfinite(record.seconds) else 0.0
    if record.status == Status.OK:
        tensor = torch.empty(shape)
        results.read_into(tensor, offset)
        if is_finite(tensor):
            return Outcome(Status.OK, tensor, "", "", seconds)
        return Outcome(Status.BAD_OUTPUT, None, "NonFinite", "returned NaN or infinity", seconds)
    if record.status == Status.ERROR:
        failure = record.failure if record.failure in _EXCEPTIONS else "Exception"
        return Outcome(Status.ERROR, None, failure, clean(record.error), seconds)
    if record.failure in _FAILURES.get(record.status, ()):
        return Outcome(Status(record.status), None, record.failure, clean(record.error), seconds)
    return Outcome(Status.BAD_OUTPUT, None, "ForgedRecord", "the result file says nonsense", seconds)
