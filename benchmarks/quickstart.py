"""The quickstart over several run seeds: time, memory, inventions of the learning arm against the frozen control.

    python benchmarks/quickstart.py --seeds 1 2 3 --out runs/benchmark

Runs that are finished are read, not run again, so the script can be stopped and called anew. It prints Markdown for
docs/results.md. Nothing else should run on the machine meanwhile.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

from selfdev.runs import Run, open_run

COLUMNS = ("written", "working", "trivial", "known", "repeated", "new")


def run_seed(seed: int, folder: Path) -> float:
    """Run or resume one seed; returns the peak memory of its largest process in GB, 0 if it was finished before."""
    if (folder / "archive.db").exists():
        if open_run(folder).archive.run.status == "done":
            return 0.0
        command = ["resume", str(folder)]
    else:
        command = ["run", "quickstart", "--set", f"seed={seed}", "--out", str(folder)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "selfdev", *command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"seed {seed} failed: see {log.name}")
    return usage.ru_maxrss / 1e6


def iterations(run: Run) -> list[dict[str, object]]:
    """The counts of every arm and iteration."""
    rows: list[dict[str, object]] = run.summary()["iterations"]
    return rows


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
    print("\nMean over the seeds, percent of the programs written:\n")
    print("| iteration | arm | working | new |\n| --- | --- | --- | --- |")
    rows = [row for run in runs.values() for row in iterations(run)]
    for iteration in sorted({int(str(row["iteration"])) for row in rows}):
        for arm in ("learning", "frozen"):
            these = [row for row in rows if (row["iteration"], row["arm"]) == (iteration, arm)]
            share = [
                mean(100 * int(str(row[c])) / int(str(row["written"])) for row in these)
                for c in ("working", "new")
            ]
            print(f"| {iteration} | {arm} | {share[0]:.1f} | {share[1]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs, peaks = {}, {}
    for seed in arguments.seeds:
        folder = arguments.out / f"quickstart-{seed}"
        peaks[seed] = run_seed(seed, folder)
        runs[seed] = open_run(folder)
        print(f"seed {seed} is done", file=sys.stderr)
    for seed, run in runs.items():
        print_run(seed, run, peaks[seed])
    print_arms(runs)
    print(f"\n{shutil.disk_usage(arguments.out).free / 1e9:.0f} GB of disk are free.", file=sys.stderr)


if __name__ == "__main__":
    main()
