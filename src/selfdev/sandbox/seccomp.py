"""The system-call filter: an allow-list, installed last and never removable.

Stops: every system call that is not in `syscalls.py`, which leaves arithmetic, memory, time and the end of
    the process; a mapping or protection with PROT_EXEC, and memory that the limits do not count: shared,
    growing down, or mapped before and made writable later; clocks, affinity and locks of other processes, by
    which a program could learn which of them live, what they use, and raise their priority; calls under
    another architecture or the x32 ABI, which kill. Does not stop: what the allowed calls can do with
    descriptors that are open (there are only three, all on /dev/null), reading the time of day, and faults of
    the kernel in the calls that are allowed.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from .kernel import PR_SET_SECCOMP, prctl
from .syscalls import TABLES, Table

_SECCOMP_MODE_FILTER = 2
_KILL_PROCESS = 0x80000000
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NR, _ARCH = 0, 4
_ARGUMENTS = (16, 24, 32, 40)  # the lower halves, which is all that the kernel reads of those below

# BPF: load a word, jump if equal / if at least / if a bit is set, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

_PROT_WRITE, _PROT_EXEC = 2, 4
# RLIMIT_DATA counts neither shared memory nor what grows down like a stack.
_MAP_SHARED, _MAP_GROWSDOWN = 0x01, 0x100
# The clocks of other processes and threads are the negative numbers.
_SIGN = 1 << 31
# What locks are made of: WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAIT_BITSET, WAKE_BITSET. All of them private,
# since others find a word by the file it lies in, and two children map the same files. Not the operations
# with priority inheritance: they take a thread's number from the word, tell whether it lives, and lend it
# this process's priority.
_FUTEX_PRIVATE, _FUTEX_CLOCK_REALTIME = 0x80, 0x100
_FUTEX = [operation | _FUTEX_PRIVATE for operation in (0, 1, 3, 4, 9, 10)]
_FUTEX += [9 | _FUTEX_PRIVATE | _FUTEX_CLOCK_REALTIME]


def instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """One ``struct sock_filter``; the jumps count the instructions that are skipped."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(table: Table) -> bytes:
    """The filter for one architecture, as an array of ``struct sock_filter``."""
    lines = [
        instruction(_LOAD, _ARCH),
        instruction(_EQUAL, table.audit_arch, if_true=1),
        instruction(_RETURN, _KILL_PROCESS),
        instruction(_LOAD, _NR),
    ]
    if table.x32_bit:
        lines += [
            instruction(_AT_LEAST, table.x32_bit, if_false=1),
            instruction(_RETURN, _KILL_PROCESS),
        ]
    for name in sorted(table.allowed):
        body = [*_CONDITIONS.get(name, []), instruction(_RETURN, _ALLOW)]
        lines += [instruction(_EQUAL, table.allowed[name], if_false=len(body)), *body]
    return b"".join([*lines, instruction(_RETURN, _REFUSE)])


def _without(argument: int, bits: int) -> list[bytes]:
    """Refuse the call if its argument has any of these bits."""
    return [
        instruction(_LOAD, _ARGUMENTS[argument]),
        instruction(_ANY_BIT, bits, if_false=1),
        instruction(_RETURN, _REFUSE),
    ]


def _one_of(argument: int, values: Sequence[int]) -> list[bytes]:
    """Refuse the call unless its argument is one of these."""
    last = len(values)
    tests = [instruction(_EQUAL, value, if_true=last - i) for i, value in enumerate(values)]
    return [instruction(_LOAD, _ARGUMENTS[argument]), *tests, instruction(_RETURN, _REFUSE)]


# Each goes on to the next instruction where the call may be made.
_CONDITIONS = {
    "mmap": _without(2, _PROT_EXEC) + _without(3, _MAP_SHARED | _MAP_GROWSDOWN),
    # RLIMIT_DATA lets pass what turns writable and is larger than the address space that is left: Linux then
    # takes RLIMIT_AS for the one that was met before (may_expand_vm in mm/mprotect.c, seen up to 6.18).
    "mprotect": _without(2, _PROT_WRITE | _PROT_EXEC),
    "clock_gettime": _without(0, _SIGN),
    "clock_getres": _without(0, _SIGN),
    "clock_nanosleep": _without(0, _SIGN),
    "sched_getaffinity": _one_of(0, [0]),
    "futex": _one_of(1, _FUTEX),
}


def install() -> None:
    """Filter this process's system calls for good. Needs no_new_privs.

    Raises:
        OSError: where the kernel has no filter mode, or the architecture has no table here.
    """
    machine = os.uname().machine
    if machine not in TABLES:
        raise OSError(f"no table of system calls for {machine}; there is one for {', '.join(sorted(TABLES))}")
    code = program(TABLES[machine])
    instructions = ctypes.create_string_buffer(code, len(code))
    length = len(code) // len(instruction(_RETURN, 0))
    header = struct.pack("@HP", length, ctypes.addressof(instructions))
    prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)
