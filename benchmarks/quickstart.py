"""The quickstart over several run seeds: does learning help, and by how much? And time, and memory.

    python benchmarks/quickstart.py --seeds 1 2 3 4 5 --out runs/benchmark --picture docs/images/inventions.png
    python benchmarks/quickstart.py --preset laptop --seeds 11 12 13 14 15 16

Runs that are finished are read, not run again, so the script can be stopped and called anew. It prints Markdown for
docs/results.md. `--set KEY=VALUE` changes the preset, for ablations: give those an `--out` of their own. For times,
nothing else should run on the machine meanwhile.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from math import isnan
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import TYPE_CHECKING, Any

from scipy.stats import t as student

from selfdev.evaluation.diversity import RAREFIED_TO
from selfdev.evaluation.standing import scores_on_first
from selfdev.results import Run, open_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("written", "working", "trivial", "known", "repeated", "new", "better")
SHARES = {
    "working": "work",
    "new": "are new and distinct",
    "better": "are new and surely better than the seed",
}
"""What is counted in percent of the programs written."""
SCORES = {
    "mean_dev": "mean development score of the new ones",
    "median_dev": "median development score of the new ones",
}
MEASURES = {**{column: f"% that {what}" for column, what in SHARES.items()}, **SCORES}
"""What is compared between the arms: shares, and the middle of the new programs' scores, each at its better scale."""
VARIETY = {
    "entropy": "entropy of behaviours, nats",
    "rarefied": f"distinct behaviours of {RAREFIED_TO} that work",
    "copies": "copies of the prompt, % of those that work",
    "distance": "distance of new ones to the nearest earlier one",
}
"""How inventive an arm is; entropy grows with the number of working programs alone, the second one does not."""

COLOURS = ("C0", "C1", "C2", "C3")
"""Of the arms, in every panel."""

Row = dict[str, object]


def run_seed(preset: str, seed: int, folder: Path, changes: Sequence[str]) -> float:
    """Run or resume one seed; returns the peak memory of its largest process in GB, 0 if it was finished before."""
    if (folder / "archive.db").exists():
        if open_run(folder).archive.run.status == "done":
            return 0.0
        command = ["resume", str(folder)]
    else:
        command = ["run", preset, "--out", str(folder)]
        command += [part for change in (f"seed={seed}", *changes) for part in ("--set", change)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "selfdev", *command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"seed {seed} failed: see {log.name}")
    return usage.ru_maxrss / 1e6


@cache
def iterations(run: Run) -> list[Row]:
    """The counts of every arm and iteration, and the median score."""
    rows: list[Row] = run.summary()["iterations"]
    for row in rows:
        scores = scores_of(run, str(row["arm"]), int(str(row["iteration"])))
        row["median_dev"] = median(scores) / 100 if scores else None
    return rows


@cache
def scores_of(run: Run, arm: str, iteration: int) -> list[float]:
    """The development scores of the new programs, each at its better scale, in percent; iterations count from 1."""
    first = scores_on_first(run.archive)
    new = [c for c in run.candidates(arm) if c.iteration + 1 == iteration and c.status == "new"]
    return [100 * first[c.name] for c in new if c.name in first]


def number(row: Row, column: str) -> float:
    """A column as a number; the counts of `SHARES` as percent of the programs written, a score in percent."""
    value = float("nan") if row[column] is None else float(str(row[column]))
    if column in SCORES or column == "copies":
        return 100 * value
    return 100 * value / float(str(row["written"])) if column in SHARES else value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t over the seeds."""
    if len(values) < 2:
        return mean(values), float("nan")
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def verdict_of(run: Run) -> dict[str, Any]:
    """The verdict of a finished run."""
    assert run.verdict is not None
    return run.verdict


def print_run(seed: int, run: Run, gigabytes: float) -> None:
    record = run.archive.run
    peak = f", peak {gigabytes:.1f} GB in one process" if gigabytes else ""
    verdict = verdict_of(run)
    print(f"\n### Run seed {seed}: {record.seconds / 60:.1f} minutes{peak}\n\n{verdict['headline']}.\n")
    print("| what | kind | development | test | 95 % interval | against best rival | p |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    shown = 0
    for row in verdict["table"]:
        shown += row["kind"] == "discovered"
        if row["kind"] == "discovered" and shown > 3:
            continue
        test, against = row["test"], row["against_best_rival"]
        cells = [row["name"], row["kind"], f"{100 * row['dev']['score']:.1f}"]
        cells += (
            [f"{100 * test['score']:.1f}", f"{100 * test['low']:.1f} to {100 * test['high']:.1f}"]
            if test
            else ["", ""]
        )
        if against:
            interval = f"{100 * against['low']:+.1f} to {100 * against['high']:+.1f}"
            p = against["p"] if against["p_adjusted"] is None else against["p_adjusted"]
            cells += [f"{100 * against['difference']:+.1f} ({interval})", f"{p:.2g}"]
        else:
            cells += ["", ""]
        print("| " + " | ".join(cells) + " |")


def print_arms(runs: dict[int, Run]) -> None:
    print("\n### Inventions by iteration\n")
    print("| seed | iteration | arm | temperature | " + " | ".join(COLUMNS) + " | best dev |")
    print("| --- " * (5 + len(COLUMNS)) + "|")
    for seed, run in runs.items():
        for row in iterations(run):
            best = "" if row["best_dev"] is None else f"{100 * float(str(row['best_dev'])):.1f}"
            counts = " | ".join(str(row[column]) for column in COLUMNS)
            print(
                f"| {seed} | {row['iteration']} | {row['arm']} | {row['temperature']:.2f} | {counts} | {best} |"
            )
    arms: list[str] = list(next(iter(runs.values())).config.controls)
    print(
        "\nPercent of the programs written, and the new programs' mean score; mean over the seeds, and the difference"
    )
    print("between the arms, seed by seed, with its 95 % interval:\n")
    print("| iteration | what | learning | " + " | ".join(f"{a} | learning - {a}" for a in arms) + " |")
    print("| --- | --- | --- " + "| --- | --- " * len(arms) + "|")
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for column, what in MEASURES.items():
            cells = [str(iteration), what, known_mean(runs, "learning", iteration, column, 1)]
            for arm in arms:
                cells.append(known_mean(runs, arm, iteration, column, 1))
                pairs = zip(
                    *(by_seed(runs, each, iteration, column) for each in ("learning", arm)), strict=True
                )
                known = [a - b for a, b in pairs if not isnan(a - b)]
                middle, half = interval(known) if known else (float("nan"), float("nan"))
                cells.append(f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})" if known else "")
            print("| " + " | ".join(cells) + " |")
    print("\n| iteration | arm | " + " | ".join(VARIETY.values()) + " |")
    print("| --- " * (2 + len(VARIETY)) + "|")
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for arm in ("learning", *arms):
            cells = [known_mean(runs, arm, iteration, column) for column in VARIETY]
            print(f"| {iteration} | {arm} | " + " | ".join(cells) + " |")

    print_scores(runs, ["learning", *arms])
    print_gains(runs, arms)


def known_mean(runs: dict[int, Run], arm: str, iteration: int, column: str, digits: int = 2) -> str:
    """The mean over the seeds that have a value, and how many these are where some have none."""
    values = [value for value in by_seed(runs, arm, iteration, column) if not isnan(value)]
    few = "" if len(values) == len(runs) else f" (seeds: {len(values)})"
    return f"{mean(values):.{digits}f}{few}" if values else ""


def print_gains(runs: dict[int, Run], arms: Sequence[str]) -> None:
    """What the best program of each arm gains over the seed model on test: sampling, and what learning adds."""
    print(
        "\nGain over the seed model on the sealed test, in points, of the program of each arm that was best on"
    )
    print("development; mean over the seeds, and the difference seed by seed with its 95 % interval:\n")
    print("| arm | seeds | gain | learning's gain there | difference |")
    print("| --- | --- | --- | --- | --- |")
    gained = {seed: gains(run) for seed, run in runs.items()}
    for arm in ("learning", *arms):
        both = [(each["learning"], each[arm]) for each in gained.values() if {"learning", arm} <= set(each)]
        if not both:
            print(f"| {arm} | 0 |  |  |  |")
            continue
        mine, its = mean(a for a, _ in both), mean(b for _, b in both)
        middle, half = interval([a - b for a, b in both])
        compared = (
            "" if arm == "learning" else f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"
        )
        print(f"| {arm} | {len(both)} | {its:+.1f} | {mine:+.1f} | {compared} |")


def gains(run: Run) -> dict[str, float]:
    """What the best program of each arm gains over the seed model on test, in points."""
    found: dict[str, float] = {}
    table = verdict_of(run)["table"]
    [seed] = [row for row in table if row["kind"] == "seed"]
    for row in table:
        if row["kind"] in ("control", "discovered") and row["test"]:
            arm = row["name"].partition("/")[0]
            found.setdefault(arm, 100 * (row["test"]["score"] - seed["test"]["score"]))
    return found


def print_scores(runs: dict[int, Run], arms: Sequence[str]) -> None:
    """The development scores of all new programs, each at its better scale, and what the arms took."""
    print(
        "\n| iteration | arm | new programs | their development score: quartiles | best | seconds an iteration |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for arm in arms:
            scores = [score for run in runs.values() for score in scores_of(run, arm, iteration)]
            rows = [r for r in rows_of(runs) if (r["arm"], r["iteration"]) == (arm, iteration)]
            seconds: list[dict[str, float]] = [row["seconds"] for row in rows]  # type: ignore[misc]
            taken = ", ".join(f"{kind} {mean(each[kind] for each in seconds):.0f}" for kind in seconds[0])
            middle = " / ".join(f"{q:.1f}" for q in quantiles(scores)) if len(scores) > 1 else ""
            print(
                f"| {iteration} | {arm} | {len(scores)} | {middle} | {max(scores, default=0):.1f} | {taken} |"
            )


def rows_of(runs: dict[int, Run]) -> list[Row]:
    """The iterations of all runs."""
    return [row for run in runs.values() for row in iterations(run)]


def by_seed(runs: dict[int, Run], arm: str, iteration: int, column: str) -> list[float]:
    """One number a seed."""
    wanted = (arm, iteration)
    rows = [[r for r in iterations(run) if (r["arm"], r["iteration"]) == wanted] for run in runs.values()]
    return [number(row, column) for [row] in rows]


def draw(runs: dict[int, Run], path: Path) -> None:
    """Draw what is measured by iteration, a line through the means and a dot a seed, and the scores at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        **{column: f"% of programs that {what}" for column, what in SHARES.items()},
        "mean_dev": f"{SCORES['mean_dev']}, %",
        **{column: VARIETY[column] for column in ("entropy", "copies", "distance")},
    }
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), constrained_layout=True)
    *panels, last = axes.flat
    for axis, (column, title) in zip(panels, titles.items(), strict=True):
        draw_by_iteration(axis, runs, column)
        axis.set_title(title, fontsize=9)
        if column != "mean_dev":
            axis.set_ylim(bottom=0)
    draw_scores(last, runs)
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def arms_of(runs: dict[int, Run]) -> list[str]:
    """All arms, the one that can win first."""
    return ["learning", *next(iter(runs.values())).config.controls]


def draw_by_iteration(axis: "Axes", runs: dict[int, Run], column: str) -> None:
    """A line through the means of each arm, and a dot a seed; a seed without a value is left out."""
    arms, iterations = arms_of(runs), sorted({int(str(row["iteration"])) for row in rows_of(runs)})
    for place, (arm, colour) in enumerate(zip(arms, COLOURS, strict=False)):
        shift = 0.06 * (place - (len(arms) - 1) / 2)
        known = {
            t: [value for value in by_seed(runs, arm, t, column) if not isnan(value)] for t in iterations
        }
        line = {t + shift: mean(values) for t, values in known.items() if values}
        axis.plot(list(line), list(line.values()), label=arm, color=colour, linewidth=2)
        dots = [(t + shift, value) for t, values in known.items() for value in values]
        axis.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, alpha=0.4, markersize=4)
    axis.set_xlabel("iteration")
    axis.set_xticks(iterations)
    axis.grid(alpha=0.3)


def draw_scores(axis: "Axes", runs: dict[int, Run]) -> None:
    """The empirical distribution of the new programs' scores in the last iteration, all seeds together."""
    last = max(int(str(row["iteration"])) for row in rows_of(runs))
    for arm, colour in zip(arms_of(runs), COLOURS, strict=False):
        scores = sorted(score for run in runs.values() for score in scores_of(run, arm, last))
        if scores:
            axis.ecdf(scores, label=f"{arm} ({len(scores)})", color=colour, linewidth=2)
    first = [score for run in runs.values() for score in scores_of(run, "learning", 1)]
    if first and last > 1:
        axis.ecdf(first, label=f"iteration 1 ({len(first)})", color="gray", linewidth=1)
    seeds = [e.score for run in runs.values() for e in run.archive.evaluations("seed")]
    axis.axvline(
        100 * mean(score or 0.0 for score in seeds), color="black", linestyle=":", label="seed model"
    )
    axis.set_title(f"share of iteration {last}'s new programs that score at most x", fontsize=9)
    axis.set_xlabel("development score, %")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs, peaks = {}, {}
    for seed in arguments.seeds:
        folder = arguments.out / f"{arguments.preset}-{seed}"
        peaks[seed] = run_seed(arguments.preset, seed, folder, arguments.changes)
        runs[seed] = open_run(folder)
        print(f"seed {seed} is done", file=sys.stderr)
    for seed, run in runs.items():
        print_run(seed, run, peaks[seed])
    print_arms(runs)
    if arguments.picture is not None:
        draw(runs, arguments.picture)
    print(f"\n{shutil.disk_usage(arguments.out).free / 1e9:.0f} GB of disk are free.", file=sys.stderr)


if __name__ == "__main__":
    main()
