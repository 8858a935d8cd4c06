"""The system-call filter: an allow-list, installed last and never removable.

Stops: every system call that is not in `syscalls.py`, which leaves arithmetic, memory, time and the end of
    the process; a mapping or protection with PROT_EXEC; calls under another architecture or the x32 ABI,
    which kill. Does not stop: what the allowed calls can do with descriptors that are open (there are only
    three, all on /dev/null), reading the clock, and faults of the kernel in the calls that are allowed.
"""

import ctypes
import errno
import os
import struct

from .kernel import PR_SET_SECCOMP, prctl
from .syscalls import TABLES, Table

_SECCOMP_MODE_FILTER = 2
_KILL_PROCESS = 0x80000000
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NR, _ARCH, _PROT = 0, 4, 16 + 2 * 8  # prot is the third argument of mmap and of mprotect
_PROT_EXEC = 4

# BPF: load a word, jump if equal / if at least / if a bit is set, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


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
    for name in ("mmap", "mprotect"):
        lines += [
            instruction(_EQUAL, table.allowed[name], if_false=4),
            instruction(_LOAD, _PROT),
            instruction(_ANY_BIT, _PROT_EXEC, if_false=1),
            instruction(_RETURN, _REFUSE),
            instruction(_RETURN, _ALLOW),
        ]
    for name in sorted(table.allowed.keys() - {"mmap", "mprotect"}):
        lines += [
            instruction(_EQUAL, table.allowed[name], if_false=1),
            instruction(_RETURN, _ALLOW),
        ]
    return b"".join([*lines, instruction(_RETURN, _REFUSE)])


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
