"""What this system offers to a sandbox, found out by trying it and not by the system's name."""

import os
import signal
import sys
from importlib import import_module

_FUNCTIONS = ((os, "fork"), (os, "memfd_create"), (os, "pidfd_open"), (signal, "pidfd_send_signal"))
_MODULES = ("fcntl", "resource")


def why_no_forkserver() -> str:
    """What keeps a forkserver from running here, and the way out; empty where nothing does."""
    way_out = "use WSL 2" if sys.platform == "win32" else "use a Linux machine, virtual machine or container"
    absent = [f"{module.__name__}.{name}" for module, name in _FUNCTIONS if not hasattr(module, name)]
    absent += [name for name in _MODULES if not _importable(name)]
    if absent:
        return f"Python on {sys.platform} is without {', '.join(absent)}; {way_out}"
    # A library may know calls that the kernel, or a container's filter, refuses.
    try:
        os.close(os.memfd_create("selfdev-test", os.MFD_ALLOW_SEALING))
    except OSError as error:
        return f"memory files: {error}; needs Linux 3.17 or newer"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"process descriptors: {error}; needs Linux 5.3 or newer"
    return ""


def has_resource_limits() -> bool:
    """Whether a process can limit itself."""
    return _importable("resource")


def has_memory_limit() -> bool:
    """Whether it can limit its memory, which is counted from what it occupies already.

    Elsewhere than on Linux that is not told. And macOS does not enforce RLIMIT_AS.
    """
    return has_resource_limits() and os.path.exists("/proc/self/statm")


def unsafe_notice() -> str:
    """What holds, and what does not, where model-written code runs without the jail."""
    if has_memory_limit():
        held = "resource limits"
    elif has_resource_limits():
        held = "a limit of processor time and a deadline, without one of memory,"
    else:
        held = "a deadline, without resource limits,"
    return f"model-written code runs with {held} alone; it can read files and use the network"


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True
