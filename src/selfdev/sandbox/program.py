"""Running a program on the calls of one chunk. All of this happens inside the jail."""

import builtins
import random
import time
import traceback
from types import CodeType
from typing import Any

import torch

from .job import Call, Record, ResultLayout, State, is_finite, view
from .message import LONGEST, clean
from .outcome import Status
from .syntax import ENTRY, FILENAME, Rejected, compile_program

_LONGEST_RAW = 4 * LONGEST
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")  # torch's words, by system


class BadOutput(Exception):
    """What the program returned cannot be used.

    Attributes:
        failure: the class of the fault.
    """

    def __init__(self, failure: str, message: str):
        super().__init__(message)
        self.failure = failure


def run(source: str, calls: list[Call], results: memoryview) -> None:
    """Run a program on every call and write a record, and a tensor if there is one, for each.

    One call's exception does not end the others.

    Args:
        source: of the program.
        calls: of the chunk.
        results: the mapped result file.
    """
    layout = ResultLayout.of(call.shape for call in calls)
    records = [slice(i * Record.SIZE, (i + 1) * Record.SIZE) for i in range(len(calls))]
    try:
        code = compile_program(source)
    except Rejected as rejection:
        rejected = _record(Status.REJECTED, rejection.failure, str(rejection)).pack()
        for place in records:
            results[place] = rejected
        return
    running = Record(State.RUNNING, "", "", "", 0.0).pack()
    for i, call in enumerate(calls):
        results[records[i]] = running
        start = time.perf_counter()
        try:
            merged = view(results, layout.offsets[i], call.shape)
            merged.copy_(_merge(code, call))  # into float32, whatever it was
            if not is_finite(merged):
                raise BadOutput("NonFinite", "returned NaN or infinity")
            record = Record(State.DONE, Status.OK, "", "", time.perf_counter() - start)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: no program ends the chunk
            record = _failure(error, time.perf_counter() - start)
        results[records[i]] = record.pack()


def _merge(code: CodeType, call: Call) -> torch.Tensor:
    """Define the program anew and call it once, so that no state of its own passes from call to call."""
    _reset(call.seed)
    namespace: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}
    exec(code, namespace)
    merge_models = namespace[ENTRY]
    arguments: list[Any] = [dict(call.model_dict), "cpu"]
    if _takes_context(merge_models):
        arguments.append(call.context)
    return _checked(merge_models(*arguments), call.shape)


def _reset(seed: int) -> None:
    """Seed the global generators, and undo what an earlier call may have set for the process."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


def _takes_context(function: Any) -> bool:
    """Whether the third parameter is the context: it is named so, or has no default of its own."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount < 3:
        return False
    required = code.co_argcount - len(function.__defaults__ or ())
    return bool(required >= 3 or code.co_varnames[2] == "context")


def _checked(value: object, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise BadOutput("NotATensor", f"returned {type(value).__name__}, not a tensor")
    if tuple(value.shape) != shape:
        raise BadOutput("ShapeMismatch", f"returned shape {tuple(value.shape)}, not {shape}")
    if value.is_complex() or value.is_quantized:
        raise BadOutput("DtypeMismatch", f"returned {value.dtype}, not a real number")
    if value.device.type != "cpu":
        raise BadOutput("DeviceMismatch", f"returned a tensor on {value.device.type}")
    value = value.detach()
    if value.layout is not torch.strided:
        value = value.to_dense()
    return value


def _failure(error: BaseException, seconds: float) -> Record:
    """Sort an exception. Its class, message and traceback are the program's own and may be hostile."""
    try:
        return _sorted(error, seconds)
    except BaseException:
        return Record(State.DONE, Status.ERROR, "Exception", "the exception itself raises", seconds)


def _sorted(error: BaseException, seconds: float) -> Record:
    text = str(error)
    if isinstance(error, BadOutput):
        return _record(Status.BAD_OUTPUT, error.failure, text, seconds)
    if isinstance(error, MemoryError) or any(word in text for word in _NO_MEMORY):
        return _record(Status.MEMORY, "OutOfMemory", "asked for more memory than its budget", seconds)
    name = type(error).__name__
    if type(error) is not vars(builtins).get(name):  # a class of its own: the parent reports no such name
        name, text = "Exception", f"{name}: {text}"
    return _record(Status.ERROR, name, text[:_LONGEST_RAW] + _where(error), seconds)


def _where(error: BaseException) -> str:
    """The program's own line at which the exception started or passed."""
    lines = [
        line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == FILENAME
    ]
    return f" (line {lines[-1]})" if lines else ""


def _record(status: Status, failure: str, text: str, seconds: float = 0.0) -> Record:
    return Record(State.DONE, status, failure[:64], clean(text), seconds)
