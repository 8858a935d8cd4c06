"""The few system calls that Python has no function for, by ctypes."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38


def syscall(number: int, *arguments: int | bytes | ctypes.c_void_p) -> int:
    """Make a system call and return its result.

    Args:
        number: of the call on this architecture.
        *arguments: integers (passed as 64 bits), bytes (passed by address) or addresses.

    Raises:
        OSError: with the call's errno.
    """
    return _checked(_libc.syscall(ctypes.c_long(number), *map(_argument, arguments)), f"system call {number}")


def prctl(option: int, *arguments: int | bytes | ctypes.c_void_p) -> int:
    """Make a ``prctl`` call, absent arguments being 0.

    Raises:
        OSError: with the call's errno.
    """
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(_libc.prctl(ctypes.c_int(option), *map(_argument, padded)), f"prctl {option}")


def madvise(address: ctypes.c_void_p, length: int, advice: int) -> int:
    """Advise the kernel on a range of memory.

    Raises:
        OSError: with the call's errno.
    """
    result = _libc.madvise(address, ctypes.c_size_t(length), ctypes.c_int(advice))
    return _checked(result, f"madvise {advice}")


def _argument(value: int | bytes | ctypes.c_void_p) -> object:
    # A plain Python int would be passed as a C int, whose upper half a variadic callee reads as garbage.
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
