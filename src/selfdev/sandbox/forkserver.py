"""The forkserver: a warm interpreter of one thread, which forks a jailed child for each job.

It is started by exec from a scrubbed environment, so it has nothing of its parent but the code. It holds no
answer, no weight and no key, never maps a tensor, never reads a source, and closes its copies of a job's
descriptors right after the fork. It ends when its parent dies or hangs up.
"""

import gc
import os
import select
import signal
import socket
from typing import Any

from . import candidate, huge_pages, privileges, warmup, wire


def main(control: str, parent: str, follow: str) -> None:
    """Serve until the parent hangs up.

    Args:
        control: descriptor of the control socket.
        parent: process id of the parent.
        follow: "follow" to be killed when the thread that started this process ends, which is right only if
            that was the parent's main thread; "stay" else. The closed socket ends the server in any case.
    """
    if follow == "follow":
        privileges.die_with(int(parent))
    connection = socket.socket(fileno=int(control))
    warmup.warm()
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(
            f"the forkserver has {threads} threads after its warm-up; a fork needs exactly one"
        )
    gc.collect()
    gc.freeze()  # what is here now is never garbage; a child's collector shall not touch (and copy) its pages
    huge_pages.collapse()
    _silence_standard_error()
    try:
        wire.send(connection, {"event": "up", "pid": os.getpid()})
        Forkserver(connection).serve()
    except wire.Hangup:
        pass
    os._exit(0)


class Forkserver:
    """The loop: fork when asked, reap when one ends, tell the parent of both."""

    def __init__(self, connection: socket.socket):
        """Serve ``connection``."""
        self.connection = connection
        self.children: dict[int, tuple[int, int]] = {}  # pidfd -> job, process id
        self.poll = select.poll()
        self.poll.register(connection, select.POLLIN)

    def serve(self) -> None:
        """Run until the parent hangs up, then kill what is left.

        Raises:
            wire.Hangup: always, in the end.
        """
        try:
            while True:
                for descriptor, _ in self.poll.poll():
                    if descriptor in self.children:
                        self.reap(descriptor)
                    else:
                        self.start(*wire.receive(self.connection))
        finally:
            for pidfd in self.children:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def start(self, job: dict[str, Any], descriptors: list[int]) -> None:
        """Fork a child for a job and hand its pidfd to the parent, opened before anything can reap it."""
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _close(descriptors)
            wire.send(self.connection, {"event": "unborn", "job": job["job"], "reason": str(error)})
            return
        if pid == 0:
            try:
                candidate.live(
                    *descriptors,
                    forkserver=server,
                    memory_bytes=job["memory_bytes"],
                    cpu_seconds=job["cpu_seconds"],
                    unsafe=job["unsafe"],
                )
            finally:
                os._exit(candidate.EXIT_BROKEN)  # whatever happens, a child never returns into this loop
        _close(descriptors)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = job["job"], pid
        self.poll.register(pidfd, select.POLLIN)
        wire.send(self.connection, {"event": "started", "job": job["job"]}, (pidfd,))

    def reap(self, pidfd: int) -> None:
        """Collect a child that has ended and tell the parent how."""
        job, pid = self.children.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        cpu_seconds = usage.ru_utime + usage.ru_stime
        wire.send(
            self.connection, {"event": "ended", "job": job, "status": status, "cpu_seconds": cpu_seconds}
        )


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _silence_standard_error() -> None:
    """Errors of the start went to the parent's file; a child must find /dev/null there."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
