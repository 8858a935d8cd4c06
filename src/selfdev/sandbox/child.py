"""One jailed child as its parent sees it: two memory files, a pipe, a pidfd and a deadline."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Sequence

from .job import READY, Call, ResultLayout, write_job
from .judgement import Death, judge
from .limits import Limits
from .memory_file import MemoryFile
from .outcome import Outcome, SandboxUnavailable

_SETUP_SECONDS = 60.0


class Child:
    """A chunk of calls on its way through one child.

    Attributes:
        ready: reading end of the pipe on which the child says that its layers stand; -1 once it has.
        deadline: on the monotonic clock, in seconds; infinite once the child is killed.
    """

    def __init__(self, source: str, calls: Sequence[Call], limits: Limits):
        """Write the job file and make the result file, both sealed before the child exists."""
        self._limits = limits
        self._layout = ResultLayout.of(call.shape for call in calls)
        self._pidfd = -1
        self._begin: float | None = None
        self._expired = False
        self._killed = False
        self.deadline = time.monotonic() + _SETUP_SECONDS
        with contextlib.ExitStack() as undo:
            self._job = MemoryFile("selfdev-job")
            undo.callback(self._job.close)
            write_job(self._job, source, calls)
            self._job.seal_contents()
            self._results = MemoryFile("selfdev-result")
            undo.callback(self._results.close)
            self._results.resize(self._layout.size)
            self._results.seal_size()
            self.ready, self._ready_end = os.pipe2(os.O_CLOEXEC)
            undo.pop_all()

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """What the forkserver needs copies of: job file, result file, writing end of the pipe."""
        return self._job.descriptor, self._results.descriptor, self._ready_end

    def submitted(self) -> None:
        """Give back what only the child needs; with our end of the pipe open its death would not show."""
        self._job.close()
        os.close(self._ready_end)
        self._ready_end = -1

    def started(self, pidfd: int) -> None:
        """Take the pidfd that the forkserver opened before it could reap the child."""
        self._pidfd = pidfd
        if self._expired:
            self._killed = self.kill()
            self.deadline = math.inf

    def hear(self) -> None:
        """Read the pipe, and start the clock if the layers stand.

        Raises:
            SandboxUnavailable: where the child says that one is missing.
        """
        said = os.read(self.ready, 4096)
        os.close(self.ready)
        self.ready = -1
        if said == READY:
            self._begin = time.monotonic()
            self.deadline = self._begin + self._limits.wall_seconds
        elif said:
            raise SandboxUnavailable(said.decode("utf-8", "replace"))

    def expire(self) -> None:
        """Kill the child at its deadline, or as soon as its pidfd is here.

        Raises:
            SandboxUnavailable: where it never finished its setup, or its pidfd does not come.
        """
        if self._begin is None:
            raise SandboxUnavailable(f"a child did not put on its layers within {_SETUP_SECONDS:g} s")
        if self._expired:
            raise SandboxUnavailable(f"the forkserver said nothing for {_SETUP_SECONDS:g} s")
        self._expired = True
        if self._pidfd >= 0:
            self._killed = self.kill()
            self.deadline = math.inf
        else:  # the child was faster with its word than the forkserver
            self.deadline = time.monotonic() + _SETUP_SECONDS

    def kill(self) -> bool:
        """Kill by pidfd, which can never mean another process. False if the child has ended by itself."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def ended(self, wait_status: int, cpu_seconds: float) -> list[Outcome]:
        """The outcomes of the chunk, once the child is dead.

        Raises:
            SandboxUnavailable: where it died before the program was looked at.
        """
        if self.ready >= 0:
            self.hear()
        if self._begin is None:
            raise SandboxUnavailable(
                f"a child died while it put on its layers (wait status {wait_status}); "
                "is the machine out of memory?"
            )
        exit_code = os.waitstatus_to_exitcode(wait_status)
        death = Death(exit_code, cpu_seconds, time.monotonic() - self._begin, self._killed)
        return judge(self._results, self._layout, death, self._limits)

    def close(self) -> None:
        """Kill the child if it lives, and give back every descriptor."""
        if self._pidfd >= 0:
            self.kill()
        self._job.close()
        self._results.close()
        for descriptor in (self.ready, self._ready_end, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.ready = self._ready_end = self._pidfd = -1
