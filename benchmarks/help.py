"""Help for weak factories, each alone: what the frozen factory of `quickstart` writes with it and without.

    OMP_NUM_THREADS=1 python benchmarks/help.py --seeds 1 2 --temperatures 0.8 0.57

`grammar`: `factory.grammar: python`. `repair turn`, which is here and not in the package: half of the programs are
written as always; then the factory is shown those that failed, each with its error, and may write each once more; what
is left of the programs is written as always.

The first iteration's programs are written and screened as in a run, on the probes and, if they are new there, on the
real tensors; none is scored. Prompts and random streams are the same in every column, so the differences are by pairs.
Intervals are 95 %: Wilson's for a share, the normal one for a mean of paired differences. Seconds are those of
writing; of the repair turn, those of the turns alone.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, stdev

from scipy.stats import binomtest

from selfdev.algorithms.screening import REAL_TOLERANCE, History, Screen, explained_by_combination
from selfdev.algorithms.source import OPENING, unwrap_short
from selfdev.archive import Candidate
from selfdev.candidates import read_candidate, remember, screened
from selfdev.config import Config, load_config
from selfdev.evaluation.evaluator import Evaluator, Refused
from selfdev.evaluation.tasks import load_task
from selfdev.factory.factory import LocalFactory
from selfdev.factory.prompt import STOP, Prompt
from selfdev.factory.sampling import Sample, Sampler
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.sources import resolve
from selfdev.runs import jail_limits
from selfdev.sandbox import Sandbox
from selfdev.streams import stream_seed

WORKS = {"new", "trivial", "known", "repeated"}
PLAIN, GRAMMAR, REPAIR = "none", "grammar", "repair turn"
LONGEST_ERROR = 200


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

    def __call__(self, config: Config, samples: Sequence[tuple[int, Sample]]) -> list[Candidate]:
        history = History()
        judged = []
        for number, (prompt, sample) in enumerate(samples):
            candidate = read_candidate("frozen", 0, number, prompt, sample, config.prompt.form)
            if candidate.source is not None:
                candidate = screened(candidate, self.screen(candidate.source, history))
            if candidate.status == "new":
                candidate = self._on_real_tensors(candidate)
            remember(history, candidate)
            judged.append(candidate)
        return judged

    def _on_real_tensors(self, candidate: Candidate) -> Candidate:
        try:
            distance = explained_by_combination(self.scorer.merge(candidate), self.scorer.vectors.vectors)
        except Refused as refused:
            return replace(candidate, status=refused.status, failure=refused.failure, error=refused.error)
        return replace(candidate, status="trivial") if distance <= REAL_TOLERANCE else candidate


def repair_prompt(prompt: Prompt, candidate: Candidate) -> Prompt:
    """The prompt, the program that failed, and its error."""
    failed = unwrap_short(candidate.source or "").rstrip("\n")
    error = (candidate.error or "")[:LONGEST_ERROR].replace("\n", " ")
    text = f"{prompt.text.removesuffix(OPENING)}{failed}\n\n\n# It fails: {error}\n# Corrected:\n{OPENING}"
    return Prompt(text, prompt.examples, prompt.form)


def take_repair_turns(
    factory: LocalFactory,
    temperature: float,
    samples: Sequence[tuple[int, Sample]],
    judged: Sequence[Candidate],
) -> list[tuple[int, Sample]]:
    """One more program for each of the first half that failed, with the error before its eyes."""
    config, half = factory.config, len(samples) // 2
    failing = [c for c in judged[:half] if c.status == "failed" and c.source][: len(samples) - half]
    prompts = factory.prompts(0)
    asked = [repair_prompt(prompts[c.prompt], c).tokens(factory.tokenizer) for c in failing]
    sampler = Sampler(
        temperature,
        config.factory.top_p,
        config.factory.max_new_tokens,
        STOP[config.prompt.form],
        config.factory.top_k,
        config.factory.min_p,
        config.factory.batch,
    )
    seeds = [[stream_seed(config.seed, "sample", 0, half + place)] for place in range(len(failing))]
    written = sampler(factory.model([]), factory.tokenizer, asked, seeds)
    return [(c.prompt, sample) for c, [sample] in zip(failing, written, strict=True)]


def measure(config: Config, temperature: float, judge: Judge, tallies: dict[str, Tally]) -> None:
    """Write and screen the first iteration of one seed in every way."""
    for way, grammar in ((PLAIN, "none"), (GRAMMAR, "python")):
        settings = config.factory.model_copy(update={"grammar": grammar})
        factory = LocalFactory(config.model_copy(update={"factory": settings}))
        factory.prepare(lambda done, total, note: None)
        factory.model([])
        with tallies[way].timed():
            samples = factory.write(factory.prompts(0), 0, temperature, [], lambda done, total, note: None)
        judged = judge(config, samples)
        tallies[way].add(judged)
        if way == PLAIN:
            with tallies[REPAIR].timed():
                turns = take_repair_turns(factory, temperature, samples, judged)
            half = len(samples) // 2
            tallies[REPAIR].turns += len(turns)
            tallies[REPAIR].add(judge(config, [*samples[:half], *turns, *samples[half + len(turns) :]]))


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
        box = stack.enter_context(Sandbox(jail_limits(config)))
        folder = resolve(config.merge.seed)
        experts = {name: resolve(source) for name, source in config.merge.experts.items()}
        vectors = read_task_vectors(folder, experts, config.merge.targets)
        task = load_task(config.task.name)
        judge = Judge(
            Screen(box), Evaluator(folder, vectors, task, config.task.development, box, config.seed)
        )
        for temperature in arguments.temperatures:
            tallies = {way: Tally() for way in (PLAIN, GRAMMAR, REPAIR)}
            for seed in arguments.seeds:
                changed = load_config("quickstart", [f"seed={seed}", f"programs={arguments.programs}"])
                measure(changed, temperature, judge, tallies)
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
