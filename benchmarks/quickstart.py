"""The quickstart over several run seeds: does learning help, and by how much? And time, and memory.

    python benchmarks/quickstart.py --seeds 1 2 3 4 5 --out runs/benchmark --picture docs/images/inventions.png

Runs that are finished are read, not run again, so the script can be stopped and called anew. It prints Markdown for
docs/results.md. `--set KEY=VALUE` changes the preset, for ablations: give those an `--out` of their own. For times,
nothing else should run on the machine meanwhile.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, quantiles, stdev

from scipy.stats import t as student

from selfdev.evaluation.standing import scores_on_first
from selfdev.runs import Run, open_run

COLUMNS = ("written", "working", "trivial", "known", "repeated", "new", "better")
SHARES = {
    "working": "work",
    "new": "are new and distinct",
    "better": "are new and surely better than the seed",
}
"""What is counted in percent of the programs written."""
SCORE = "mean development score of the new ones"
MEASURES = {**{column: f"% that {what}" for column, what in SHARES.items()}, "mean_dev": SCORE}
"""What is compared between the arms: the shares, and the mean of the new programs' scores, each at its better scale."""

Row = dict[str, object]


def run_seed(seed: int, folder: Path, changes: Sequence[str]) -> float:
    """Run or resume one seed; returns the peak memory of its largest process in GB, 0 if it was finished before."""
    if (folder / "archive.db").exists():
        if open_run(folder).archive.run.status == "done":
            return 0.0
        command = ["resume", str(folder)]
    else:
        command = ["run", "quickstart", "--out", str(folder)]
        command += [part for change in (f"seed={seed}", *changes) for part in ("--set", change)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "selfdev", *command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"seed {seed} failed: see {log.name}")
    return usage.ru_maxrss / 1e6


@cache
def iterations(run: Run) -> list[Row]:
    """The counts of every arm and iteration."""
    rows: list[Row] = run.summary()["iterations"]
    return rows


def number(row: Row, column: str) -> float:
    """A column as a number; the counts of `SHARES` as percent of the programs written, a score in percent."""
    value = float("nan") if row[column] is None else float(str(row[column]))
    if column == "mean_dev":
        return 100 * value
    return 100 * value / float(str(row["written"])) if column in SHARES else value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t over the seeds."""
    if len(values) < 2:
        return mean(values), float("nan")
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def print_run(seed: int, run: Run, gigabytes: float) -> None:
    record = run.archive.run
    peak = f", peak {gigabytes:.1f} GB in one process" if gigabytes else ""
    print(f"\n### Run seed {seed}: {record.seconds / 60:.1f} minutes{peak}\n\n{run.verdict['headline']}.\n")
    print("| what | kind | development | test | 95 % interval | against best rival | p |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    shown = 0
    for row in run.verdict["table"]:
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
    arms = list(next(iter(runs.values())).config.controls)
    print(
        "\nPercent of the programs written, and the new programs' mean score; mean over the seeds, and the difference"
    )
    print("between the arms, seed by seed, with its 95 % interval:\n")
    print("| iteration | what | learning | " + " | ".join(f"{a} | learning - {a}" for a in arms) + " |")
    print("| --- | --- | --- " + "| --- | --- " * len(arms) + "|")
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for column, what in MEASURES.items():
            learning = by_seed(runs, "learning", iteration, column)
            cells = [str(iteration), what, f"{mean(learning):.1f}"]
            for arm in arms:
                other = by_seed(runs, arm, iteration, column)
                middle, half = interval([a - b for a, b in zip(learning, other, strict=True)])
                cells += [
                    f"{mean(other):.1f}",
                    f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})",
                ]
            print("| " + " | ".join(cells) + " |")
    print(
        "\n| iteration | arm | entropy of behaviours, nats | copies of the prompt, % | distance of new ones |"
    )
    print("| --- | --- | --- | --- | --- |")
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for arm in ("learning", *arms):
            rows = [r for r in rows_of(runs) if (r["arm"], r["iteration"]) == (arm, iteration)]
            distances = [float(str(r["distance"])) for r in rows if r["distance"] is not None]
            far = f"{mean(distances):.2f}" if distances else ""
            entropy, copies = (mean(number(r, column) for r in rows) for column in ("entropy", "copies"))
            print(f"| {iteration} | {arm} | {entropy:.2f} | {100 * copies:.1f} | {far} |")

    print_scores(runs, ["learning", *arms])


def print_scores(runs: dict[int, Run], arms: Sequence[str]) -> None:
    """The development scores of all new programs, each at its better scale, and what the arms took."""
    print(
        "\n| iteration | arm | new programs | their development score: quartiles | best | seconds an iteration |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    first = {seed: scores_on_first(run.archive) for seed, run in runs.items()}
    for iteration in sorted({int(str(row["iteration"])) for row in rows_of(runs)}):
        for arm in arms:
            scores = [
                100 * first[seed][c.name]
                for seed, run in runs.items()
                for c in run.candidates(arm)
                if c.iteration + 1 == iteration and c.status == "new" and c.name in first[seed]
            ]
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
    """Draw the shares and the entropy by iteration: a line through the means, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, tuple[str, Callable[[Row], float]]] = {
        column: (f"% of programs that {what}", lambda row, column=column: number(row, column))  # type: ignore[misc]
        for column, what in SHARES.items()
    }
    panels["entropy"] = ("entropy of the behaviours, nats", lambda row: number(row, "entropy"))
    panels["mean_dev"] = (f"{SCORE}, %", lambda row: number(row, "mean_dev"))
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.6), constrained_layout=True)
    arms = ["learning", *next(iter(runs.values())).config.controls]
    for axis, (title, value) in zip(axes, panels.values(), strict=True):
        for place, arm in enumerate(arms):
            rows = [row for row in rows_of(runs) if row["arm"] == arm]
            found = sorted({int(str(row["iteration"])) for row in rows})
            means = [mean(value(r) for r in rows if r["iteration"] == t) for t in found]
            shift = 0.06 * (place - (len(arms) - 1) / 2)
            [line] = axis.plot([t + shift for t in found], means, label=arm, linewidth=2)
            xs = [int(str(row["iteration"])) + shift for row in rows]
            axis.plot(xs, [value(r) for r in rows], "o", color=line.get_color(), alpha=0.4, markersize=4)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("iteration")
        axis.set_xticks(found)
        if title != panels["mean_dev"][0]:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs, peaks = {}, {}
    for seed in arguments.seeds:
        folder = arguments.out / f"quickstart-{seed}"
        peaks[seed] = run_seed(seed, folder, arguments.changes)
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
