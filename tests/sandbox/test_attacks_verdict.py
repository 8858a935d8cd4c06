"""Attacks on the verdict: leaving early, and forging what the child says of itself."""

import math

import pytest
import torch
from canaries import program

from selfdev.sandbox import Sandbox, Status

# What the jail itself holds, found as an attacker would: in the frames below and among the loaded modules.
JAIL = (
    "jail = {name: module for name, module in sys.modules.items() if name.startswith('__jail__.')}\n"
    "frame = sys._getframe()\nwhile 'results' not in frame.f_locals: frame = frame.f_back\n"
    "results = frame.f_locals['results']\nRecord, State = jail['__jail__.job'].Record, jail['__jail__.job'].State\n"
)


LEAVES = {
    "exit_zero": ("os._exit(0)", "EarlyExit"),
    "exit_other": ("os._exit(3)", "EarlyExit"),
    "exit_by_number": ("sys.modules['ctypes'].CDLL(None).syscall(231, 0)", "EarlyExit"),
    "exit_by_libc": ("sys.modules['ctypes'].CDLL(None)._exit(0)", "EarlyExit"),
    "exit_at_code_of_a_missing_layer": ("os._exit(70)", "EarlyExit"),
    "exit_in_a_message": (
        "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        "EarlyExit",
    ),
    "exit_of_a_class_name": (
        "class M(type):\n    __name__ = property(lambda self: os._exit(0))\nclass E(Exception, metaclass=M): pass\nraise E",
        "EarlyExit",
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaving_is_not_succeeding(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body, failure = LEAVES[name]
    outcome = box.merge(program(body), model_dict)
    assert (outcome.status, outcome.failure, outcome.tensor) == ("crashed", failure, None)


FORGERIES = {
    "ok_with_nan": "results[-4:] = struct.pack('<f', float('nan'))\n"
    "record = Record(State.DONE, 'ok', '', '', 0.0)",
    "ok_and_infinite_time": "record = Record(State.DONE, 'ok', '', '', float('inf'))",
    "ok_and_negative_time": "record = Record(State.DONE, 'ok', '', '', -1e9)",
    "ok_and_no_time": "record = Record(State.DONE, 'ok', '', '', float('nan'))",
    "timeout": "record = Record(State.DONE, 'timeout', 'Timeout', '', 0.0)",
    "crashed": "record = Record(State.DONE, 'crashed', 'Signal SIGKILL', '', 0.0)",
    "unknown_status": "record = Record(State.DONE, 'winner', '', '', 0.0)",
    "control_characters": "record = Record(State.DONE, 'error', '\\x1b[31m', '\\x1b[2J\\n' * 100, 0.0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_says_nothing_that_could_not_be_returned(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = (
        JAIL
        + "struct = sys.modules['struct']\n"
        + FORGERIES[name]
        + "\nresults[: Record.SIZE] = record.pack()\nos._exit(0)"
    )
    outcome = box.merge(program(body), model_dict)
    # Claiming `ok` is worth no more than returning the zeros that lie in the result file.
    if outcome.ok:
        assert outcome.tensor is not None
        assert torch.equal(outcome.tensor, torch.zeros(12, 8))
    assert outcome.status in (Status.OK, Status.ERROR, Status.BAD_OUTPUT)
    assert outcome.error.isprintable()
    assert outcome.failure.isprintable()
    assert 0 <= outcome.seconds < math.inf


def test_garbage_all_over_the_result_file_is_bad_output(
    box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    for byte in (1, 2, 255):
        body = JAIL + f"results[:] = bytes([{byte}]) * len(results)\nos._exit(0)"
        outcome = box.merge(program(body), model_dict)
        assert outcome.status in ("bad_output", "crashed"), outcome


def test_done_records_do_not_excuse_a_hang(patient_box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = JAIL + (
        "record = Record(State.DONE, 'ok', '', '', 0.0).pack()\n"
        "for i in range(2): results[i * Record.SIZE : (i + 1) * Record.SIZE] = record\nwhile True: pass"
    )
    statuses = [outcome.status for outcome in patient_box.merge_many(program(body), [model_dict] * 2)]
    assert statuses == ["ok", "timeout"]


def test_the_result_file_cannot_be_shrunk_or_grown(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = JAIL + "results.obj.resize(1)"
    outcome = box.merge(program(body), model_dict)
    assert outcome.status == "error", outcome
    body = (
        JAIL
        + "ctypes = sys.modules['ctypes']\ngot = any(ctypes.CDLL(None).ftruncate(fd, 0) == 0 for fd in range(99))"
    )
    outcome = box.merge(program(body), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()


def test_raising_the_jails_own_exceptions_gains_nothing(
    box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = JAIL + "raise jail['__jail__.layers'].LayerMissing('no Landlock here')"
    assert box.merge(program(body), model_dict).failure == "Exception"
    body = JAIL + "raise jail['__jail__.program'].BadOutput('Timeout', 'x')"
    outcome = box.merge(program(body), model_dict)
    assert (outcome.status, outcome.failure) == ("bad_output", "ForgedRecord")


# Every class that the jail itself gives, and one that it does not.
OURS = [
    *("Timeout", "CpuTime", "EarlyExit", "Signal SIGSEGV", "OutOfMemory", "ForgedRecord"),
    *("NonFinite", "NotATensor", "ShapeMismatch", "DtypeMismatch", "DeviceMismatch"),
    *("SourceTooLong", "TooComplex", "ImportNotAllowed", "NoEntryPoint", "WrongSignature", "SomethingElse"),
]


@pytest.mark.parametrize("name", OURS)
def test_no_program_names_its_failure_as_the_jail_would(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    raised = box.merge(program(f"raise type({name!r}, (Exception,), {{}})('words')"), model_dict)
    assert (raised.status, raised.failure, raised.error) == ("error", "Exception", f"{name}: words (line 6)")
    body = JAIL + f"record = Record(State.DONE, 'error', {name!r}, 'words', 0.0)\n"
    written = box.merge(program(body + "results[: Record.SIZE] = record.pack()\nos._exit(0)"), model_dict)
    assert (written.status, written.failure, written.error) == ("error", "Exception", "words")


@pytest.mark.parametrize("status", ["rejected", "memory", "bad_output"])
def test_a_failure_that_the_jail_does_not_give_is_a_forgery(
    status: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = JAIL + f"record = Record(State.DONE, {status!r}, 'Timeout', 'words', 0.0)\n"
    outcome = box.merge(program(body + "results[: Record.SIZE] = record.pack()\nos._exit(0)"), model_dict)
    assert (outcome.status, outcome.failure) == ("bad_output", "ForgedRecord")


def test_a_program_may_say_that_it_lacks_memory(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    outcome = box.merge(program("raise MemoryError"), model_dict)
    assert (outcome.status, outcome.failure) == ("memory", "OutOfMemory")  # as documented


def test_writing_to_any_descriptor_reaches_no_one(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = "for fd in range(3, 1024):\n    try:\n        os.write(fd, b'ready'); got = True\n    except OSError: pass"
    outcome = box.merge(program(body), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()
