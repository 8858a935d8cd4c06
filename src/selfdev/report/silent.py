"""Watching without a word."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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

    def rival(self, best: Evaluation | None) -> None:
        """Say nothing."""
