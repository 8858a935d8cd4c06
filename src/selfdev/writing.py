"""How an iteration is written: every program under a usual prompt, or with a repair turn (`factory.repair_turn`).

Of a repair turn the first half of the programs is written as always. Those of them in which a function can be read and
which fail on the probes are shown to the factory, each under its own prompt with its error, and the next numbers are
what it writes then; the rest is written as always. Nothing but the text of these prompts tells the programs apart: all
count, and none is asked for a third time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfdev.algorithms.screening import History
from selfdev.archive import Candidate
from selfdev.candidates import read_candidate, screened
from selfdev.config import Config
from selfdev.factory.prompt import Prompt, correcting
from selfdev.roles import Factory, Screener
from selfdev.watcher import Tick


@dataclass(frozen=True)
class Writing:
    """The writing of one iteration of one arm.

    Attributes:
        config: of the run.
        factory: writes.
        screen: says what fails, if there is a repair turn.
        arm: whose programs they are.
        t: the iteration, from 0.
        adapters: what the arm has learned so far, in order.
        tick: progress.
    """

    config: Config
    factory: Factory
    screen: Screener
    arm: str
    t: int
    adapters: Sequence[Path]
    tick: Tick

    @property
    def temperature(self) -> float:
        """Of the sampling."""
        return self.config.factory.temperature_at(self.t)

    @property
    def count(self) -> int:
        """How many programs are written."""
        return self.config.budgets[self.t]

    def write(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Candidate]]:
        """Have the iteration's programs written.

        Args:
            prompts: the usual ones; each gets an equal share of the programs, neighbours in the order.

        Returns:
            The prompts, those of the repair turn after the usual ones, and the programs in the order of their numbers,
            each with the index of its prompt. What has failed has its status, everything else has none yet.
        """
        count = self.count
        usual = [(number, number * len(prompts) // count) for number in range(count)]
        if not self.config.factory.repair_turn:
            return list(prompts), self._written(prompts, usual)
        half = count // 2
        first = self._written(prompts, usual[:half])
        for number, candidate in enumerate(first):
            self.tick(half, count, f"{number} of {half} screened for the repair turn")
            first[number] = self._tried(candidate)
        failing = [c for c in first if c.source is not None and c.status == "failed"]
        turns = [correcting(prompts[c.prompt], c.source or "", c.error or "") for c in failing]
        everything = [*prompts, *turns]
        places = [(half + place, len(prompts) + place) for place in range(len(turns))]
        return everything, first + self._written(everything, places + usual[half + len(turns) :])

    def _written(self, prompts: Sequence[Prompt], places: Sequence[tuple[int, int]]) -> list[Candidate]:
        """Programs of these numbers, each under the prompt of its index."""
        begun, count = places[0][0], self.count
        samples = self.factory.write(
            [(number, prompts[index]) for number, index in places],
            self.t,
            self.temperature,
            self.adapters,
            lambda done, total, note: self.tick(begun + done, count, note),
        )
        return [
            read_candidate(self.arm, self.t, number, index, sample, self.config.prompt.form)
            for (number, index), sample in zip(places, samples, strict=True)
        ]

    def _tried(self, candidate: Candidate) -> Candidate:
        """The program with its failure, if it fails on the probes; whether it is new is found out later, in order."""
        if candidate.source is None:
            return candidate
        found = self.screen(candidate.source, History())
        return screened(candidate, found) if found.novelty is None else candidate
