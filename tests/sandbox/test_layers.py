"""What can be looked at without a jail: the filter's program, the tables, the wire, the judgement."""

import re
import socket
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdev.sandbox import Limits, Status, landlock, seccomp, wire
from selfdev.sandbox.job import Record, ResultLayout
from selfdev.sandbox.judgement import Death, judge
from selfdev.sandbox.memory_file import MemoryFile
from selfdev.sandbox.syscalls import AARCH64, TABLES, X86_64, Table

KILL, REFUSE, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000


# Arguments with which each call that is checked for them may be made.
HARMLESS = {"mmap": (0, 4096, 3, 0x22), "futex": (0, 0x80), "sched_getaffinity": (0, 128)}


def verdict(table: Table, number: int, *arguments: int, arch: int | None = None) -> int:
    """Run the filter's program as the kernel would, and give its return value."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, table.audit_arch if arch is None else arch, 0, *padded)
    lines = list(struct.iter_unpack("=HBBI", seccomp.program(table)))
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = lines[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            return int(operand)
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_filter_allows_exactly_its_list(table: Table) -> None:
    arguments = {table.allowed[name]: harmless for name, harmless in HARMLESS.items()}
    verdicts = {number: verdict(table, number, *arguments.get(number, ())) for number in range(600)}
    allowed = {number for number in verdicts if verdicts[number] == ALLOW}
    assert allowed == set(table.allowed.values())
    assert {verdicts[number] for number in set(range(600)) - allowed} == {REFUSE}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(("name", "refused"), [("mmap", 4), ("mprotect", 4 | 2)], ids=["mmap", "mprotect"])
def test_the_filter_refuses_executable_memory_and_what_turns_writable(
    table: Table, name: str, refused: int
) -> None:
    for protection in range(8):
        expected = REFUSE if protection & refused else ALLOW
        assert verdict(table, table.allowed[name], 0, 4096, protection, 0x22) == expected


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [(0x22, ALLOW), (0x20022, ALLOW), (0x21, REFUSE), (0x23, REFUSE), (0x01, REFUSE), (0x122, REFUSE)],
)
def test_the_filter_refuses_memory_that_the_limits_do_not_count(
    table: Table, flags: int, expected: int
) -> None:
    assert verdict(table, table.allowed["mmap"], 0, 4096, 3, flags) == expected


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["clock_gettime", "clock_getres", "clock_nanosleep"])
def test_the_filter_refuses_the_clocks_of_others(table: Table, name: str) -> None:
    for clock in range(12):
        assert verdict(table, table.allowed[name], clock) == ALLOW
    for process in (0, 1, 4242, 2**22):  # as clock_getcpuclockid and pthread_getcpuclockid make them
        for kind in range(8):
            number = (~process << 3) | kind
            assert verdict(table, table.allowed[name], number % 2**32) == REFUSE
            assert verdict(table, table.allowed[name], number % 2**64) == REFUSE


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_filter_shows_the_affinity_of_the_caller_alone(table: Table) -> None:
    for process in (1, 4242, 2**31, 2**32 - 1):
        assert verdict(table, table.allowed["sched_getaffinity"], process) == REFUSE


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_filter_allows_private_locks_without_priority_inheritance(table: Table) -> None:
    wait, wake, requeue, compare_and_requeue, wait_bitset, wake_bitset = 0, 1, 3, 4, 9, 10
    private, realtime = 0x80, 0x100
    plain = {wait, wake, requeue, compare_and_requeue, wait_bitset, wake_bitset}
    expected = {operation | private for operation in plain} | {wait_bitset | private | realtime}
    found = {op for op in range(1024) if verdict(table, table.allowed["futex"], 0, op) == ALLOW}
    assert found == expected


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_filter_kills_other_architectures(table: Table) -> None:
    for arch in {0xC000003E, 0xC00000B7, 0x40000003, 0x40000028, 0} - {table.audit_arch}:
        assert verdict(table, table.allowed["getpid"], arch=arch) == KILL


def test_the_filter_kills_x32_calls() -> None:
    assert verdict(X86_64, 0x40000000 + X86_64.allowed["getpid"]) == KILL
    assert verdict(X86_64, 0xFFFFFFFF) == KILL


HEADERS = {
    "x86_64": (X86_64, "x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": (AARCH64, "asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_the_kernels(machine: str) -> None:
    table, name = HEADERS[machine]
    header = Path("/usr/include") / name
    if not header.exists():
        pytest.skip(f"the kernel's header {header} is not on this machine")
    kernel = {
        match[1]: int(match[2])
        for match in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", header.read_text())
    }
    assert {call: kernel[call] for call in table.allowed} == table.allowed


def test_both_tables_allow_the_same_calls() -> None:
    assert X86_64.allowed.keys() == AARCH64.allowed.keys()


FORBIDDEN = """
open openat openat2 creat stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat
getcwd chdir ioctl fcntl socket socketpair connect bind sendto sendmsg clone clone3 fork vfork execve execveat
kill tkill tgkill pidfd_open pidfd_send_signal ptrace process_vm_readv process_vm_writev prctl seccomp bpf
io_uring_setup memfd_create pipe pipe2 dup dup2 dup3 eventfd2 shmget mount unshare setns userfaultfd
perf_event_open keyctl pkey_mprotect personality setrlimit prlimit64 rt_sigqueueinfo membarrier
"""


def test_nothing_of_the_forbidden_families_is_allowed() -> None:
    assert X86_64.allowed.keys().isdisjoint(FORBIDDEN.split())


@pytest.mark.parametrize(
    ("abi", "size", "file_bits"),
    [(1, 8, 13), (2, 8, 14), (3, 8, 15), (4, 16, 15), (5, 16, 16), (6, 24, 16), (9, 24, 16)],
)
def test_landlock_handles_all_that_the_abi_offers(abi: int, size: int, file_bits: int) -> None:
    attributes = landlock.ruleset(abi)
    assert len(attributes) == size
    handled = struct.unpack(f"={size // 8}Q", attributes)
    assert handled[0] == 2**file_bits - 1
    assert set(handled[1:]) <= {3}


def test_the_wire_carries_messages_and_descriptors(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "file", "w+") as file:
        wire.send(ours, {"text": "ünï" * 1000}, (file.fileno(),))
        wire.send(ours, {"n": 2})
        first, (copy,) = wire.receive(theirs)
        second, none = wire.receive(theirs)
        assert (first["text"], second, none) == ("ünï" * 1000, {"n": 2}, [])
        assert copy != file.fileno()
        with open(copy, "w") as other:
            other.write("seen")
        file.seek(0)  # the two share one position
        assert file.read() == "seen"
        ours.close()
        with pytest.raises(wire.Hangup):
            wire.receive(theirs)


def result_file(layout: ResultLayout) -> MemoryFile:
    file = MemoryFile("test")
    file.resize(layout.size)
    return file


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("plain words (line 3)", "plain words (line 3)"),
        ("a\n\tb\r\n  c", "a b c"),
        ("<object at 0x7f12abcDEF00>", "<object at 0x...>"),
        ("0x1F and 0xffffff", "0x1F and 0x..."),
        ("\x1b[2Jx\x00y", "?[2Jx?y"),
        ("na\u00efve a\u0301 \u202ex\u200b\u3164\U0001f600", "na?ve a? ?x???"),
        ("x" * 1000, "x" * 300),
        ("0x7f12abcdef00 " * 80, ("0x... " * 80)[:300]),
    ],
)
def test_a_message_is_cleaned_by_the_parent_whatever_the_child_wrote(said: str, shown: str) -> None:
    layout = ResultLayout.of([(1,)])
    file = result_file(layout)
    file.write(Record(2, "error", "ValueError", said, 0.5).pack(), 0)
    (outcome,) = judge(file, layout, Death(EXITED, 0.0, 1.0, False), Limits())
    file.close()
    assert (outcome.failure, outcome.error) == ("ValueError", shown)


def test_a_length_that_no_message_has_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("!I", 2**31) + b"{")
        theirs.settimeout(10)  # without the check it waits for two gigabytes
        with pytest.raises(wire.Hangup):
            wire.receive(theirs)


EXITED, KILLED, SEGFAULT, OUT_OF_TIME = 0, -9, -11, -24


@settings(max_examples=200, deadline=None)
@given(
    garbage=st.binary(max_size=3 * Record.SIZE + 200),
    states=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    exit_code=st.sampled_from([EXITED, KILLED, SEGFAULT, OUT_OF_TIME, 3, -6]),
    killed=st.booleans(),
)
def test_whatever_a_child_leaves_there_is_one_outcome_for_each_call(
    garbage: bytes, states: list[int], exit_code: int, killed: bool
) -> None:
    layout = ResultLayout.of([(2, 3), (0,), (5,)])
    file = result_file(layout)
    file.write(garbage[: layout.size], 0)
    for i, state in enumerate(states):
        file.write(bytes([state]), i * Record.SIZE)
    outcomes = judge(file, layout, Death(exit_code, 1.0, 2.0, killed), Limits())
    file.close()
    assert len(outcomes) == 3
    for outcome, shape in zip(outcomes, layout.shapes, strict=True):
        assert outcome.status in set(Status)
        assert outcome.ok == (outcome.tensor is not None)
        assert outcome.error.isprintable()
        assert outcome.error.isascii()
        assert outcome.failure.isprintable()
        assert 0 <= outcome.seconds <= 2.0
        if outcome.tensor is not None:
            assert outcome.tensor.shape == shape
            assert bool(torch.isfinite(outcome.tensor).all())
    if exit_code != EXITED:
        assert not outcomes[-1].ok


def done(status: str = "ok") -> bytes:
    return Record(2, status, "", "", 0.5).pack()


@pytest.mark.parametrize(
    ("death", "failures"),
    [
        (Death(EXITED, 0, 1, False), ["", ""]),
        (Death(EXITED, 0, 1, True), ["", ""]),  # it had ended before the kill reached it
        (Death(KILLED, 0, 1, True), ["", "Timeout"]),
        (Death(KILLED, 0, 1, False), ["", "Signal SIGKILL"]),
        (Death(KILLED, 10, 1, False), ["", "CpuTime"]),
        (Death(OUT_OF_TIME, 10, 1, False), ["", "CpuTime"]),
        (Death(SEGFAULT, 0, 1, False), ["", "Signal SIGSEGV"]),
        (Death(SEGFAULT, 0, 1, True), ["", "Signal SIGSEGV"]),
        (Death(1, 0, 1, False), ["", "EarlyExit"]),
    ],
)
def test_the_wait_status_decides_over_what_the_child_says(death: Death, failures: list[str]) -> None:
    layout = ResultLayout.of([(1,), (1,)])
    file = result_file(layout)
    file.write(done() + done(), 0)
    assert [outcome.failure for outcome in judge(file, layout, death, Limits())] == failures
    file.close()
