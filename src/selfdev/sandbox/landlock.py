"""Landlock with no rule: no file may be opened, made, run or removed, no TCP port bound or reached.

Stops: everything that goes through opening a path (reading, writing, listing, executing, linking,
truncating, device ioctls), TCP connect and bind (ABI 4), signals to and abstract sockets of processes
outside of the jail (ABI 6). Does not stop: `stat`, `access`, `readlink`, `chdir`, `getcwd`, UDP, and what
is done with descriptors that are open already. The system-call filter denies those.
"""

import os
import struct

from .kernel import syscall

# The same numbers on x86_64 and aarch64, since they were given out after the tables were unified.
_CREATE_RULESET = 444
_RESTRICT_SELF = 446
_VERSION = 1

# How many LANDLOCK_ACCESS_FS_* bits an ABI knows: REFER came with 2, TRUNCATE with 3, IOCTL_DEV with 5.
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FILE_BITS_LATEST = 16
_NET_BIND_AND_CONNECT_TCP = 0b11
_SCOPE_ABSTRACT_SOCKET_AND_SIGNAL = 0b11


def abi() -> int:
    """The version of the kernel's Landlock interface, 1 or more.

    Raises:
        OSError: ENOSYS where the kernel was built without it, EOPNOTSUPP where it was not enabled at boot.
    """
    return syscall(_CREATE_RULESET, 0, 0, _VERSION)


def ruleset(version: int) -> bytes:
    """A ``struct landlock_ruleset_attr`` that handles all that ABI ``version`` offers."""
    attributes = struct.pack("=Q", (1 << _FILE_BITS.get(version, _FILE_BITS_LATEST)) - 1)
    if version >= 4:
        attributes += struct.pack("=Q", _NET_BIND_AND_CONNECT_TCP)
    if version >= 6:
        attributes += struct.pack("=Q", _SCOPE_ABSTRACT_SOCKET_AND_SIGNAL)
    return attributes


def restrict() -> None:
    """Restrict this process for good. Needs no_new_privs or CAP_SYS_ADMIN.

    Raises:
        OSError: where the kernel has no Landlock, or where 16 layers are stacked already.
    """
    if os.uname().machine not in ("x86_64", "aarch64"):
        raise OSError(f"Landlock's system calls are not tabulated for {os.uname().machine}")
    attributes = ruleset(abi())
    descriptor = syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        syscall(_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)
