"""What the trained factory writes at one temperature and another, and the frozen one: each arm at its own best.

    python benchmarks/temperature.py runs/benchmark/quickstart-* --temperatures 0.57 0.7 0.85 --sets 2

In a run all arms write at one temperature, which falls by iteration. What suits a factory that mostly fails may be too
cold for one that has learned, and what was learned might be had by cooling the other. Here the factory as it was before
the last iteration of each run, trained and frozen, writes that iteration anew, under other prompts and random streams,
at each temperature; every set is as large as an iteration. What the arm wrote before it counts as known.
New programs are scored on development as in the run and, at the better of their scales, on 2,046 questions of the run's
sealed test, whose verdict is over; nothing is chosen by that.

Prints Markdown for docs/results.md: means over the runs, and differences run by run with uncorrected 95 % intervals by
Student's t. What is measured is kept in --out, so a call that was cut off goes on, and several calls, each with its own
--out, can share the work: --read adds what others have kept.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isnan
from pathlib import Path
from statistics import mean, median
from typing import Any

from population import HOME, LEAST, evaluator
from quickstart import interval
from selfdev.algorithms.screening import History, Novelty, Screen
from selfdev.archive import FACTOR, Candidate
from selfdev.candidates import read_candidate, remember, screened
from selfdev.evaluation.evaluator import Evaluator, Refused, Trivial, score_again
from selfdev.evaluation.standing import NORMED, repairs_of
from selfdev.factory.factory import LocalFactory
from selfdev.results import Run, open_run
from selfdev.sandbox import Sandbox

FIRST_SET = 100
"""Counted as an iteration, which names prompts and random streams: beyond those of any run."""

MEASURES = {
    "working": "% that work",
    "new": "% new and distinct",
    "gain": f"% new, and {LEAST:g} point or more above the seed on the sealed test",
    "median": "median gain of the new ones on the sealed test, points",
}

Cell = dict[str, Any]
"""One arm of a run at one temperature, one set: counts of every status, and `gains` of the new ones in points."""


def history_before(run: Run, arm: str) -> History:
    """What the arm may not repeat in the last iteration."""
    history = History()
    for candidate in run.candidates(arm) + run.archive.candidates(repairs_of(arm)):
        if candidate.iteration + 1 < run.config.iterations:
            remember(history, candidate)
    return history


def adapters_before(run: Run, arm: str) -> list[Path]:
    """What the arm's factory had learned before the last iteration."""
    rounds = [run.folder / r.adapter for r in run.archive.refinements(arm) if r.adapter is not None]
    return rounds[-1:] if run.config.refinement.refit == "fresh" else rounds


def gain(judge: Evaluator, candidate: Candidate, norm: float | None, base: float) -> float:
    """A new program's gain over the seed on the sealed test, in points, at its better scale of development."""
    tried = [judge.candidate(candidate, "development")]
    if norm is not None:
        tried.append(score_again(judge, candidate, "development", NORMED, 1.0, norm))
    best = max(tried, key=lambda each: each.score or 0.0)
    factor = float(best.parameters.get(FACTOR, 1.0))
    found = score_again(judge, candidate, "test", 0 if factor == 1.0 else NORMED, factor).score
    return 0.0 if found is None else 100 * (found - base)


def measure(
    run: Run,
    arm: str,
    temperature: float,
    number: int,
    factory: LocalFactory,
    screen: Screen,
    judge: Evaluator,
) -> Cell:
    """Write, screen and score one set."""
    count, t = run.config.budgets[-1], FIRST_SET + number
    prompts = factory.prompts(t)
    asked = [(n, prompts[n * len(prompts) // count]) for n in range(count)]
    adapters = adapters_before(run, arm) if arm == "learning" else []
    samples = factory.write(asked, t, temperature, adapters, lambda *_: None)
    history, base = history_before(run, arm), judge.seed("test").score or 0.0
    cell: Cell = defaultdict(int)
    gains = []
    for n, sample in enumerate(samples):
        index = n * len(prompts) // count
        candidate = read_candidate(arm, t, n, index, sample, run.config.prompt.form)
        if candidate.source is not None:
            found = screen(candidate.source, history)
            candidate = screened(candidate, found)
            if found.novelty is Novelty.NEW:
                try:
                    gains.append(gain(judge, candidate, run.config.scaling.norm, base))
                except Refused as refused:
                    status = "trivial" if isinstance(refused, Trivial) else "failed"
                    candidate = replace(candidate, status=status)
            remember(history, candidate)
        cell[candidate.status or "failed"] += 1
    return {**cell, "gains": gains}


def key(arm: str, temperature: float, number: int) -> str:
    """The name of a cell."""
    return f"{arm} {temperature:g} {number}"


def measured(
    kept: dict[str, dict[str, Cell]], folder: Path, temperatures: Sequence[float], sets: int, out: Path
) -> None:
    """Measure what is missing of a run."""
    name = str(folder.resolve())
    cells = kept.setdefault(name, {})
    wanted = [
        (arm, temperature, number)
        for number in range(sets)
        for arm in ("frozen", "learning")
        for temperature in temperatures
        if key(arm, temperature, number) not in cells
    ]
    if not wanted:
        return
    run = open_run(folder)
    factory = LocalFactory(run.config)
    with Sandbox(run.config.jail.limits, workers=run.config.jail.workers) as box:
        screen, judge = Screen(box), evaluator(run, HOME, box, run.config.task.development)
        for arm, temperature, number in wanted:
            cells[key(arm, temperature, number)] = measure(
                run, arm, temperature, number, factory, screen, judge
            )
            aside = out.with_suffix(".part")
            aside.write_text(json.dumps(kept))
            aside.replace(out)


def value(cells: Sequence[Cell], what: str) -> float:
    """One measure over some sets of a run; NaN where nothing is new."""
    written: int = sum(count for cell in cells for status, count in cell.items() if status != "gains")
    gains = [g for cell in cells for g in cell["gains"]]
    if what == "median":
        return median(gains) if gains else float("nan")
    count: float = {
        "working": written - sum(cell.get("failed", 0) for cell in cells),
        "new": len(gains),
        "gain": sum(g >= LEAST for g in gains),
    }[what]
    return 100 * count / written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.57, 0.7, 0.85])
    parser.add_argument("--sets", type=int, default=1, help="of as many programs as an iteration has")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/temperature.json"), help="keeps what is measured"
    )
    parser.add_argument("--read", type=Path, nargs="*", default=[], help="what other calls have kept")
    arguments = parser.parse_args()
    kept: dict[str, dict[str, Cell]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for folder in arguments.runs:
        measured(kept, folder, arguments.temperatures, arguments.sets, arguments.out)
    for path in arguments.read:
        for name, cells in json.loads(path.read_text()).items():
            kept.setdefault(name, {}).update(cells)
    print_table(kept, arguments.temperatures)


def print_table(kept: dict[str, dict[str, Cell]], temperatures: Sequence[float]) -> None:
    """Both arms by temperature, and learning's difference from the frozen one at each pair of them, and over all."""

    def of(arm: str, heat: Sequence[float], what: str) -> dict[str, float]:
        found = {}
        for name, cells in kept.items():
            begins = tuple(f"{arm} {temperature:g} " for temperature in heat)
            its = [cell for key_, cell in cells.items() if key_.startswith(begins)]
            if its and not isnan(number := value(its, what)):
                found[name] = number
        return found

    def apart(mine: Sequence[float], its: Sequence[float], what: str) -> str:
        ours, theirs = of("learning", mine, what), of("frozen", its, what)
        differences = [ours[name] - theirs[name] for name in ours if name in theirs]
        if len(differences) < 2:
            return ""
        middle, half = interval(differences)
        return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"

    print(f"| arm | temperature | runs | {' | '.join(MEASURES.values())} |")
    print("| --- " * (3 + len(MEASURES)) + "|")
    for arm in ("frozen", "learning"):
        for temperature in temperatures:
            columns = [of(arm, [temperature], what) for what in MEASURES]
            cells = [f"{mean(column.values()):.1f}" if column else "" for column in columns]
            print(f"| {arm} | {temperature:g} | {len(columns[0])} | {' | '.join(cells)} |")
    print(f"\n| learning at | frozen at | {' | '.join(MEASURES.values())} |")
    print("| --- " * (2 + len(MEASURES)) + "|")
    for mine, its in product(temperatures, temperatures):
        print(f"| {mine:g} | {its:g} | {' | '.join(apart([mine], [its], what) for what in MEASURES)} |")
    print(f"| all | all | {' | '.join(apart(temperatures, temperatures, what) for what in MEASURES)} |")


if __name__ == "__main__":
    main()
