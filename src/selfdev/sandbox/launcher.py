"""The parent's hold on the forkserver: starting it, submitting jobs, hearing of them, ending it."""

import fcntl
import os
import socket
import subprocess
import threading
from typing import Any

from . import interpreter, wire
from .limits import Limits
from .memory_file import MemoryFile
from .outcome import SandboxUnavailable

_START_SECONDS = 180.0
_STOP_SECONDS = 5.0


class Launcher:
    """A running forkserver."""

    def __init__(self) -> None:
        """Start it and wait until it is warm.

        Raises:
            SandboxUnavailable: with the reason.
        """
        self._errors = MemoryFile("selfdev-forkserver-errors")
        ours, theirs = _socket_pair()
        try:
            self.process = _start(theirs, self._errors)
        except OSError as error:
            ours.close()
            self._errors.close()
            raise SandboxUnavailable(f"the forkserver cannot be started: {error}") from error
        finally:
            theirs.close()
        self.connection = ours
        self.owner = os.getpid()
        try:
            ours.settimeout(_START_SECONDS)
            wire.receive(ours)
            ours.settimeout(None)
        except (wire.Hangup, TimeoutError) as error:
            reason = self._last_error() or type(error).__name__
            self.stop()
            raise SandboxUnavailable(f"the forkserver did not start: {reason}") from error
        except BaseException:
            self.stop()
            raise

    def submit(self, job: int, descriptors: tuple[int, int, int], limits: Limits, *, unsafe: bool) -> None:
        """Ask for a child. Its job file, result file and ready pipe are copied to the server.

        Raises:
            wire.Hangup: where the server is gone.
        """
        message = {
            "job": job,
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": limits.cpu_seconds,
            "unsafe": unsafe,
        }
        wire.send(self.connection, message, descriptors)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next event. Raises `wire.Hangup` where the server is gone."""
        return wire.receive(self.connection)

    def stop(self) -> None:
        """Hang up, which ends the server and its children, and wait for it."""
        self.connection.close()
        self._errors.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _last_error(self) -> str:
        text = os.pread(self._errors.descriptor, 1 << 20, 0).decode("utf-8", "replace").strip()
        return text.splitlines()[-1] if text else ""


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, neither on descriptor 0 to 2, which the server has on /dev/null."""
    low = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    high = []
    for end in low:
        high.append(socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)))
        end.close()
    return high[0], high[1]


def _start(control: socket.socket, errors: MemoryFile) -> subprocess.Popen[bytes]:
    # The kernel sends the parent-death signal when the thread that started a process ends, so only the main
    # thread's servers may ask for it. The others end when the socket closes.
    follow = threading.current_thread() is threading.main_thread()
    return subprocess.Popen(
        interpreter.command(
            "forkserver", str(control.fileno()), str(os.getpid()), "follow" if follow else "stay"
        ),
        env=interpreter.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors.descriptor,
        pass_fds=(control.fileno(),),
        start_new_session=True,  # a Ctrl-C on the terminal is the parent's business
    )
