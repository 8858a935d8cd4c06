"""Who takes part in the cycle, as far as the cycle knows them; the one who scores is `evaluation.evaluator.Scorer`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from selfdev.algorithms.screening import History, Screening
from selfdev.factory.prompt import Prompt
from selfdev.factory.sampling import Sample
from selfdev.factory.taught import Taught


class Factory(Protocol):
    """Who writes and learns; `selfdev.factory.factory.LocalFactory`, or a scripted one in a test."""

    @property
    def facts(self) -> dict[str, Any]: ...
    def prepare(self, tick: Any) -> None: ...
    def prompts(self, iteration: int) -> list[Prompt]: ...
    def write(
        self,
        asked: Sequence[tuple[int, Prompt]],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Any,
    ) -> list[Sample]: ...
    def tokens(self, text: str) -> tuple[int, ...]: ...
    def refine(
        self, taught: Taught, iteration: int, adapters: Sequence[Path], out: Path, tick: Any
    ) -> dict[str, Any]: ...


class Screener(Protocol):
    """Does a program run, and is it new? `selfdev.algorithms.screening.Screen`."""

    def __call__(self, source: str, history: History) -> Screening: ...
