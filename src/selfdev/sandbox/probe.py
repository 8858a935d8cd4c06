"""Every layer tried for real on this machine, each in a process of its own, for `selfdev doctor`."""

import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass

from . import interpreter, landlock, layers, privileges
from .kernel import prctl
from .memory_file import MemoryFile

_SECONDS = 60.0
_BUDGET = 256 * 1024**2  # bytes of memory in the trials


@dataclass(frozen=True)
class Probe:
    """One layer's result.

    Attributes:
        name: of the layer.
        ok: whether it was installed and then did what it is for.
        detail: what was seen, or why it failed.
        remedy: what to do where it failed.
    """

    name: str
    ok: bool
    detail: str
    remedy: str


def probe() -> list[Probe]:
    """Try every layer. Starts one small interpreter and takes about 0.2 s.

    Raises:
        RuntimeError: where that interpreter does not run.
    """
    done = subprocess.run(
        interpreter.command("probe"),
        env=interpreter.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"the probe ended with exit code {done.returncode}: {reason[0]}")
    return [Probe(**result) for result in json.loads(done.stdout)]


def main() -> None:
    """In the small interpreter: run all trials and print them as JSON."""
    results = [
        _tried("memory files", _memory_files, "needs Linux 3.17 or newer"),
        _tried("process descriptors", _process_descriptors, "needs Linux 5.3 or newer"),
    ]
    trials: dict[str, Callable[[], str]] = {
        "session": _session,
        "user": _user,
        "parent-death signal": _parent_death,
        "undumpable": _undumpable,
        "resource limits": _too_large,
        "no_new_privs": _no_new_privileges,
        "Landlock": _landlock,
        "seccomp": _seccomp,
    }
    for layer in layers.full(os.getpid(), memory_bytes=_BUDGET, cpu_seconds=10):

        def trial(layer: layers.Layer = layer) -> str:
            if layer.name in ("Landlock", "seccomp"):
                privileges.forbid_new_privileges()
            layer.install()
            return trials[layer.name]()

        results.append(_tried(layer.name, trial, layer.remedy))
        if layer.name == "resource limits":
            # Of the two limits on memory each must hold alone: the trial above meets RLIMIT_AS first.
            results.append(
                _tried(
                    "writable memory",
                    functools.partial(_writable_memory, layer),
                    "needs Linux 4.7 or newer, booted without ignore_rlimit_data",
                )
            )
    print(json.dumps([asdict(result) for result in results]))


def _tried(name: str, trial: Callable[[], str], remedy: str) -> Probe:
    """Run a trial in a child, since most layers cannot be taken off again."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = [True, trial()]
        except BaseException as error:
            answer = [False, f"{type(error).__name__}: {error}"]
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    ok, detail = json.loads(said) if said else (False, f"the trial died (wait status {status})")
    return Probe(name, ok, detail, "" if ok else remedy)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


def _refused(attempt: Callable[[], object], what: str, *numbers: int) -> None:
    try:
        attempt()
    except OSError as error:
        _expect(error.errno in numbers, f"{what} failed with {error} instead of a refusal")
    else:
        raise RuntimeError(f"{what} was not refused")


def _memory_files() -> str:
    file = MemoryFile("probe")
    file.resize(4096)
    file.seal_contents()
    _refused(lambda: file.write(b"x", 0), "writing to a sealed file", errno.EPERM)
    _refused(lambda: file.resize(0), "shrinking a sealed file", errno.EPERM)
    return f"seals hold ({fcntl.fcntl(file.descriptor, fcntl.F_GET_SEALS):#x})"


def _process_descriptors() -> str:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    _expect(os.WIFSIGNALED(status), "a kill by descriptor did not kill")
    return "a child was killed by its descriptor"


def _session() -> str:
    _expect(os.getsid(0) == os.getpid(), "still in the parent's session")
    return "own session"


def _user() -> str:
    _expect(0 not in (*os.getresuid(), *os.getresgid()), "still root")
    with open("/proc/self/status") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff"))
    _expect(int(effective, 16) == 0, f"capabilities left: {effective}")
    return f"uid {os.getuid()}, no capabilities"


def _parent_death() -> str:
    seen = ctypes.c_int(0)
    prctl(2, ctypes.c_void_p(ctypes.addressof(seen)))  # PR_GET_PDEATHSIG
    _expect(seen.value == signal.SIGKILL, f"signal {seen.value} is set")
    return "SIGKILL when the parent dies"


def _undumpable() -> str:
    _expect(prctl(3) == 0, "still dumpable")  # PR_GET_DUMPABLE
    return "memory is closed to others"


def _writable_memory(limits: layers.Layer) -> str:
    """RLIMIT_DATA: address space given back may not all be taken again as writable memory."""
    reserve = mmap.mmap(-1, 2 * _BUDGET, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    limits.install()
    reserve.close()
    bytearray(_BUDGET // 2)
    return _too_large()


def _too_large() -> str:
    what = f"{2 * _BUDGET >> 20} MiB"
    budget = f"at a budget of {_BUDGET >> 20} MiB"
    try:
        bytearray(2 * _BUDGET)
    except MemoryError:
        return f"{what} refused {budget}"
    raise RuntimeError(f"{what} were given {budget}")


def _no_new_privileges() -> str:
    _expect(prctl(39) == 1, "not set")  # PR_GET_NO_NEW_PRIVS
    return "set"


def _landlock() -> str:
    _refused(lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY), "opening a directory", errno.EACCES)
    return f"ABI {landlock.abi()}; opening / was refused"


def _seccomp() -> str:
    _refused(os.getcwd, "getcwd", errno.EPERM)
    _refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "a UDP socket", errno.EPERM)
    _refused(
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC), "executable memory", errno.EPERM
    )
    return "getcwd, a UDP socket and executable memory were refused"
