"""What a process may do by being who it is: user, capabilities, and what its parent's death does to it."""

import os
import signal
import struct

from .kernel import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl, syscall

_NOBODY = 65534
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522


def drop_user() -> None:
    """Become nobody when root, and hold no capability in any case.

    Stops: what root may do, and reading what the user may read if a later layer fails. Does not stop:
        anything that every user may do; a user who is not root stays who they are.

    Raises:
        OSError: where this root may not become nobody, as in a namespace that maps only one user.
    """
    if os.geteuid() == 0 or os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    syscall(_CAPSET[os.uname().machine], header, bytes(24))


def die_with(parent: int) -> None:
    """Be killed when the parent dies. A change of the user clears this, so it comes after ``drop_user``.

    Args:
        parent: its process id, to notice that it died before this call.

    Raises:
        OSError: where the parent is gone already.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the parent died first")


def forbid_inspection() -> None:
    """Be undumpable: other processes of the same user can neither trace this one nor read its memory.

    Stops: one jailed child reading another. Does not stop: root outside of the jail.
    """
    prctl(PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    """Set no_new_privs: no exec can ever gain rights. The next two layers need it."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
