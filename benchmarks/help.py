"""Help for weak factories, each alone: what the frozen factory of `quickstart` writes with it and without.

    OMP_NUM_THREADS=1 python benchmarks/help.py --seeds 1 2 --temperatures 0.8 0.57

`grammar`: `factory.grammar: python`. `repair turn`: `factory.repair_turn: true`. `no warm start`:
`factory.warm_start.steps: 0`, so what the warm start gives is `none` minus it. `int8`: no help, but linear layers in
torch's own int8 (dynamic, a scale for each output), which is not in the package: its activations have one scale for the
whole batch, so that what a program becomes hangs on its neighbours, and the sampler's own test of the model is put off.

The first iteration's programs are written and screened as in a run, on the probes and, if they are new there, on the
real tensors; none is scored. Prompts and random streams are the same in every row, but for the prompts of the turns, so
the differences are by pairs. Intervals are 95 %: Wilson's for a share, the normal one for a mean of paired differences.
Seconds are those of writing all programs; with the repair turn, of screening its first half too.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from unittest.mock import patch

import torch
from scipy.stats import binomtest
from torch import nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

from selfdev.algorithms.screening import REAL_TOLERANCE, History, Screen, explained_by_combination
from selfdev.archive import Candidate
from selfdev.candidates import remember, screened
from selfdev.config import load_config
from selfdev.evaluation.evaluator import Evaluator, Refused
from selfdev.evaluation.tasks import load_task
from selfdev.factory.factory import LocalFactory
from selfdev.merging.relatives import find_relatives
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models import shared_prefix
from selfdev.sandbox import Sandbox
from selfdev.watcher import Tick
from selfdev.writing import Writing

WORKS = {"new", "trivial", "known", "repeated"}
PLAIN, INT8 = "none", "int8"
WAYS = {
    PLAIN: [],
    "grammar": ["factory.grammar=python"],
    "repair turn": ["factory.repair_turn=true"],
    "no warm start": ["factory.warm_start.steps=0"],
    INT8: [],
}


@dataclass
class Tally:
    """What one way to write came to, program by program over all seeds."""

    statuses: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    turns: int = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu

    def add(self, judged: Sequence[Candidate]) -> None:
        self.statuses += [str(c.status) for c in judged]
        self.failures.update(c.failure for c in judged if c.status == "failed" and c.failure)
        self.tokens += sum(len(c.tokens) for c in judged)

    def hits(self, wanted: set[str]) -> list[bool]:
        return [status in wanted for status in self.statuses]


@dataclass(frozen=True)
class Judge:
    """Screens programs as the cycle does."""

    screen: Screen
    scorer: Evaluator

    def __call__(self, written: Sequence[Candidate]) -> list[Candidate]:
        history = History()
        judged = []
        for candidate in written:
            if candidate.status is None:
                candidate = screened(candidate, self.screen(candidate.source or "", history))
            if candidate.status == "new":
                candidate = self._on_real_tensors(candidate)
            remember(history, candidate)
            judged.append(candidate)
        return judged

    def _on_real_tensors(self, candidate: Candidate) -> Candidate:
        try:
            distance = explained_by_combination(self.scorer.merge(candidate), self.scorer.vectors.vectors)
        except Refused as refused:
            return replace(candidate, status="failed", failure=refused.failure, error=refused.error)
        return replace(candidate, status="trivial") if distance <= REAL_TOLERANCE else candidate


def measure(seed: int, temperature: float, programs: int, judge: Judge, tallies: dict[str, Tally]) -> None:
    """Write and screen the first iteration of one seed in every way."""
    for way, changes in WAYS.items():
        same = [f"seed={seed}", f"programs={programs}", f"factory.temperature={temperature}"]
        config = load_config("quickstart", [*same, *changes])
        factory = LocalFactory(config)
        factory.prepare(lambda done, total, note: None)
        model = factory.model([])
        tolerance = {}
        if way == INT8:
            quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
            tolerance[torch.float32] = math.inf
        prompts = factory.prompts(0)
        writing = Writing(config, factory, judge.screen, "frozen", 0, [], Tick())
        with tallies[way].timed(), patch.dict(shared_prefix.TOLERANCE, tolerance):
            asked, written = writing.write(prompts)
        tallies[way].turns += len(asked) - len(prompts)
        tallies[way].add(judge(written))


def share(hits: list[bool]) -> str:
    low, high = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return f"{100 * mean(hits):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def difference(ours: list[bool], others: list[bool]) -> str:
    gaps = [100.0 * (a - b) for a, b in zip(ours, others, strict=True)]
    half = 1.96 * stdev(gaps) / len(gaps) ** 0.5
    return f"{mean(gaps):+.1f} ({mean(gaps) - half:+.1f} to {mean(gaps) + half:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 0.57])
    parser.add_argument("--programs", type=int, default=56)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        config = load_config("quickstart")
        box = stack.enter_context(Sandbox(config.jail.limits, workers=config.jail.workers))
        found = find_relatives(config.merge.seed, config.merge.experts)
        vectors = read_task_vectors(found.seed, found.experts, config.merge.targets)
        task = load_task(config.task.name)
        judge = Judge(
            Screen(box), Evaluator(found.seed, vectors, task, config.task.development, box, config.seed)
        )
        for temperature in arguments.temperatures:
            tallies = {way: Tally() for way in WAYS}
            for seed in arguments.seeds:
                measure(seed, temperature, arguments.programs, judge, tallies)
                print({way: Counter(t.statuses) for way, t in tallies.items()}, flush=True)
            show(temperature, tallies)


def show(temperature: float, tallies: dict[str, Tally]) -> None:
    """Print a table of Markdown."""
    print(
        f"\n| T {temperature} | work, % | new and distinct, % | work - none | new - none | tokens | s of writing |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = tallies[PLAIN]
    for way, tally in tallies.items():
        cells = [way]
        cells += [share(tally.hits(wanted)) for wanted in (WORKS, {"new"})]
        cells += [difference(tally.hits(wanted), plain.hits(wanted)) for wanted in (WORKS, {"new"})]
        cells += [str(tally.tokens), f"{tally.seconds:.0f} ({tally.cpu_seconds:.0f} of CPU)"]
        print("| " + " | ".join(cells) + " |")
    for way, tally in tallies.items():
        turns = f"; {tally.turns} repair turns" if tally.turns else ""
        print(f"{way}: failures {dict(tally.failures.most_common())}{turns}", flush=True)


if __name__ == "__main__":
    main()
