"""One program on many tensors: chunks go to children, several at once, and outcomes come back in order."""

import math
import select
import time
from collections.abc import Iterator, Sequence

from .child import Child
from .job import Call, chunks
from .launcher import Launcher
from .limits import Limits
from .outcome import Outcome, SandboxUnavailable


class Batch:
    """What one `merge_many` does."""

    def __init__(
        self,
        launcher: Launcher,
        source: str,
        calls: Sequence[Call],
        limits: Limits,
        numbers: Iterator[int],
        *,
        unsafe: bool,
    ):
        """Prepare a batch.

        Args:
            launcher: the running forkserver.
            source: of the program.
            calls: all of them; `job.chunks` groups them.
            limits: of each child.
            numbers: gives every job a number that no job of this forkserver had.
            unsafe: resource limits alone.
        """
        self._launcher = launcher
        self._source = source
        self._calls = calls
        self._limits = limits
        self._numbers = numbers
        self._unsafe = unsafe
        self._children: dict[int, tuple[range, Child]] = {}
        self._outcomes: dict[int, Outcome] = {}

    def run(self, workers: int) -> list[Outcome]:
        """Run all chunks, at most ``workers`` at once.

        Whatever it raises, KeyboardInterrupt too, the forkserver may be in the middle of a message, and may
        have children that nobody waits for. It is of no use any more.

        Raises:
            SandboxUnavailable: where the jail broke.
            wire.Hangup: where the forkserver died.
        """
        waiting = list(reversed(list(chunks(self._calls))))
        try:
            while waiting or self._children:
                while waiting and len(self._children) < workers:
                    self._start(waiting.pop())
                self._attend()
        finally:
            for _, child in self._children.values():
                child.close()
        return [self._outcomes[i] for i in range(len(self._calls))]

    def _start(self, places: range) -> None:
        child = Child(self._source, [self._calls[i] for i in places], self._limits)
        number = next(self._numbers)
        self._children[number] = places, child
        self._launcher.submit(number, child.descriptors, self._limits, unsafe=self._unsafe)
        child.submitted()

    def _attend(self) -> None:
        """Wait for the next thing to happen and deal with it."""
        children = [child for _, child in self._children.values()]
        poll = select.poll()
        poll.register(self._launcher.connection, select.POLLIN)
        pipes = {child.ready: child for child in children if child.ready >= 0}
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        rest = min(child.deadline for child in children) - time.monotonic()
        happened = {descriptor for descriptor, _ in poll.poll(_milliseconds(rest))}
        for pipe in happened & pipes.keys():
            pipes[pipe].hear()
        if self._launcher.connection.fileno() in happened:
            self._hear_server()
        else:  # what the server says comes before the clock: a child that has ended is not killed
            for child in children:
                if child.deadline <= time.monotonic():
                    child.expire()

    def _hear_server(self) -> None:
        event, descriptors = self._launcher.receive()
        places, child = self._children[event["job"]]
        match event["event"]:
            case "started":
                child.started(descriptors[0])
            case "unborn":
                raise SandboxUnavailable(f"the forkserver cannot fork: {event['reason']}")
            case "ended":
                outcomes = child.ended(event["status"], event["cpu_seconds"])
                self._outcomes.update(zip(places, outcomes, strict=True))
                del self._children[event["job"]]
                child.close()


def _milliseconds(seconds: float) -> float | None:
    """A timeout for poll, rounded up, so that it never returns just before the deadline again and again."""
    return None if seconds == math.inf else max(0, math.ceil(seconds * 1000))
