"""Learning against sampling at equal seconds: the time that training takes goes into more programs instead.

    python benchmarks/quickstart.py --seeds 1 2 3 --out runs/benchmark
    python benchmarks/equal_seconds.py --seeds 1 2 3 --learning runs/benchmark --out runs/sampling

The controls of a run write as many programs as the learning arm, in a fraction of its time. Here the frozen factory
writes `--times` as many in runs of its own, with the same run seeds, so the same questions, and the same number of
programs tuned and tested. It prints Markdown for docs/results.md: what both found in a whole run, and the seconds that
it took them. Runs that are finished are read, one that was cut off goes on.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from quickstart import gains, interval, iterations, run_seed
from selfdev.results import Run, open_run

SAMPLING = ("refinement.refit=never", "controls=[]", "rivals=[]")
"""Nothing is learned, so that the arm called `learning` is the frozen factory."""


def whole(run: Run, column: str) -> float:
    """A count of the learning arm over all iterations."""
    return sum(float(str(row[column])) for row in mine(run))


def seconds(run: Run) -> float:
    """Of the learning arm: writing, scoring and learning."""
    taken: list[dict[str, float]] = [row["seconds"] for row in mine(run)]  # type: ignore[misc]
    return sum(sum(each.values()) for each in taken)


def mine(run: Run) -> list[dict[str, object]]:
    """The learning arm's iterations."""
    return [row for row in iterations(run) if row["arm"] == "learning"]


def best(run: Run) -> float:
    """The best score on development, in percent."""
    scores = [float(str(row["best_dev"])) for row in mine(run) if row["best_dev"] is not None]
    return 100 * max(scores, default=float("nan"))


MEASURES: dict[str, Callable[[Run], float]] = {
    "programs written": lambda run: whole(run, "written"),
    "seconds, all iterations": seconds,
    "programs that work": lambda run: whole(run, "working"),
    "new and distinct programs": lambda run: whole(run, "new"),
    "new ones surely better than the seed": lambda run: whole(run, "better"),
    "these for each minute": lambda run: 60 * whole(run, "better") / seconds(run),
    "best score on development, %": best,
    "gain of the best on development over the seed, on test, points": lambda run: gains(run).get(
        "learning", float("nan")
    ),
}
"""What is compared, over the whole of a run."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--times", type=int, default=4, help="as many programs as the learning arm writes")
    parser.add_argument(
        "--learning", type=Path, default=Path("runs/benchmark"), help="where benchmarks/quickstart.py ran"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    learning: dict[int, Run] = {}
    for seed in arguments.seeds:
        folder = arguments.learning / f"quickstart-{seed}"
        if not (folder / "archive.db").exists():
            sys.exit(f"{folder} holds no run: run benchmarks/quickstart.py first, or choose --learning")
        learning[seed] = open_run(folder)
    sampling: dict[int, Run] = {}
    for seed, run in learning.items():
        folder = arguments.out / f"sampling-{arguments.times}-{seed}"
        run_seed(
            run.archive.run.preset,
            seed,
            folder,
            [*SAMPLING, f"programs={[arguments.times * number for number in run.config.budgets]}"],
        )
        sampling[seed] = open_run(folder)
        print(f"seed {seed} is done", file=sys.stderr)
    print(f"| over a whole run, mean of {len(sampling)} seeds | learning | sampling alone | difference |")
    print("| --- | --- | --- | --- |")
    for what, measure in MEASURES.items():
        one, other = ([measure(runs[seed]) for seed in sampling] for runs in (learning, sampling))
        middle, half = interval([a - b for a, b in zip(one, other, strict=True)])
        print(
            f"| {what} | {mean(one):.1f} | {mean(other):.1f} | {middle:+.1f} "
            f"({middle - half:+.1f} to {middle + half:+.1f}) |"
        )
    print_price(learning, sampling)


def print_price(learning: dict[int, Run], sampling: dict[int, Run]) -> None:
    """How many programs sampling alone needs to find as much, between the control's number and `--times` as many."""
    found = total(learning, "better", "learning")
    few, many = total(learning, "written", "frozen"), total(sampling, "written", "learning")
    less, more = total(learning, "better", "frozen"), total(sampling, "better", "learning")
    print(
        f"\nSurely better than the seed: {found:g} of learning's {few:g} programs, {less:g} of as many of sampling's."
    )
    if less < found < more:
        needed = few + (found - less) * (many - few) / (more - less)
        print(
            f"Sampling alone would write {needed / len(learning):.0f} programs a run for as many, by a straight line "
            "between the two. If that advantage is real, learning pays in seconds where a program takes more than "
            f"{training(learning) / (needed - few):.1f} s to write and score."
        )


def total(runs: dict[int, Run], column: str, arm: str) -> float:
    """A count of an arm over all iterations of all runs."""
    rows = (row for run in runs.values() for row in iterations(run) if row["arm"] == arm)
    return sum(float(str(row[column])) for row in rows)


def training(runs: dict[int, Run]) -> float:
    """Seconds of learning, in all runs."""
    spent: list[Any] = [row["seconds"] for run in runs.values() for row in mine(run)]
    return sum(float(each["learning"]) for each in spent)


if __name__ == "__main__":
    main()
