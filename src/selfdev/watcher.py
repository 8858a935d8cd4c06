"""Who is told what is happening, after it is archived: the progress display, or nobody."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from selfdev.archive import Candidate, Evaluation


class Tick:
    """Progress of one phase. Called with how much is done, of how much, and a note.

    Attributes:
        seconds: how long the phase took, once it is over.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, done: int, total: int, note: str) -> None:
        """Progress was made."""


class Watcher(Protocol):
    """What the cycle tells."""

    def phase(
        self, name: str, arm: str | None = None, iteration: int | None = None
    ) -> AbstractContextManager[Tick]:
        """Enter a phase; what it yields is called with the progress and knows the time at the end."""

    def screened(self, candidate: Candidate, evaluation: Evaluation | None) -> None:
        """A candidate has its status."""

    def scored(self, evaluation: Evaluation) -> None:
        """A candidate has answered every question of its race."""

    def rival(self, best: Evaluation | None) -> None:
        """The best rival so far."""


class Silent:
    """Tells nobody anything, and takes the time."""

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        """Take the time of a phase."""
        tick, began = Tick(), time.monotonic()
        try:
            yield tick
        finally:
            tick.seconds = time.monotonic() - began

    def screened(self, candidate: Candidate, evaluation: Evaluation | None) -> None:
        """Say nothing."""

    def scored(self, evaluation: Evaluation) -> None:
        """Say nothing."""

    def rival(self, best: Evaluation | None) -> None:
        """Say nothing."""
