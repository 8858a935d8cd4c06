"""Do the quickstart's programs hold on models that no run has seen? Transfers of finished runs to the zoo `nano2`.

    python benchmarks/transfer.py runs/quickstart-1 runs/quickstart-2 runs/quickstart-3

It writes RUN/transfers/..., so give copies where a run's folder shall stay as it is. A transfer that is finished is
read and not made again. Prints Markdown for docs/results.md.

Of several runs a last table compares like with like: the run's best program, those of its controls and its best rival,
all as they left the run, and the rivals that were tuned anew; means over the runs, with 95 % intervals by Student's t.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import selfdev
from population import AWAY, evaluator
from quickstart import interval
from selfdev.errors import UserError
from selfdev.results import Run, Transfer
from selfdev.sandbox import Sandbox
from selfdev.zoo import zoo_models

ZOO = "nano2"
SHOWN = 3
"""Discovered programs in each table; `selfdev show --json` has all."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    runs = [(selfdev.open_run(run), carried_over(run)) for run in arguments.parse_args().runs]
    for run, transfer in runs:
        print_transfer(run, transfer)
    if len(runs) > 1:
        print_together(runs)


def carried_over(run: Path) -> Transfer:
    """The run's transfer to the zoo, made now if it is not there yet."""
    for folder in sorted((run / "transfers").glob(f"{ZOO}-*")):
        if Transfer(folder).verdict is not None:
            return Transfer(folder)
    experts = {name: f"zoo:{ZOO}/{name}" for name in zoo_models(ZOO)["experts"]}
    try:
        return selfdev.transfer(run, f"zoo:{ZOO}/seed", experts, ZOO)
    except UserError as error:
        raise SystemExit(str(error)) from error


def print_transfer(run: Run, transfer: Transfer) -> None:
    summary = transfer.summary()
    there = {row["name"]: row for row in run.summary()["table"]}
    print(
        f"\n### {run.folder.name}: {summary['run']['seconds'] / 60:.1f} minutes\n\n{summary['headline']}.\n"
    )
    print(
        f"| what | kind | test in the run | development | test on {ZOO} | 95 % interval | against best rival | p |"
    )
    print("| --- " * 8 + "|")
    discovered = 0
    for row in summary["table"]:
        discovered += row["kind"] == "discovered"
        if row["kind"] == "discovered" and discovered > SHOWN:
            continue
        test, against, before = row["test"], row["against_best_rival"], there.get(row["name"])
        cells = [row["name"], row["kind"]]
        cells.append(f"{100 * before['test']['score']:.1f}" if before and before["test"] else "")
        cells.append("" if row["dev"]["score"] is None else f"{100 * row['dev']['score']:.1f}")
        if test:
            cells += [f"{100 * test['score']:.1f}", f"{100 * test['low']:.1f} to {100 * test['high']:.1f}"]
        else:
            cells += [f"failed: {row['failure']}", ""]
        if against:
            p = against["p"] if against["p_adjusted"] is None else against["p_adjusted"]
            interval = f"{100 * against['low']:+.1f} to {100 * against['high']:+.1f}"
            cells += [f"{100 * against['difference']:+.1f} ({interval})", f"{p:.2g}"]
        else:
            cells += ["", ""]
        print("| " + " | ".join(cells) + " |")


def print_together(runs: list[tuple[Run, Transfer]]) -> None:
    """Print what each kind of entrant gains over the seed, and the discovered program more than it."""
    gains: dict[str, list[float]] = defaultdict(list)
    apart: dict[str, list[float]] = defaultdict(list)
    for run, transfer in runs:
        its = gains_of(run, transfer)
        for what, gain in its.items():
            gains[what].append(gain)
            apart[what].append(its["discovered, unchanged"] - gain)
    print(f"\n| on {ZOO}, {len(runs)} runs | gain over the seed on test, points | discovered - it |")
    print("| --- | --- | --- |")
    for what, found in gains.items():
        middle, half = interval(apart[what])
        cell = "" if not half else f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"
        print(f"| {what} | {mean(found):.1f} | {cell} |")


def gains_of(run: Run, transfer: Transfer) -> dict[str, float]:
    """Points over the seed; what fails gains nothing."""
    assert run.verdict is not None
    assert transfer.verdict is not None
    scores = {row["name"]: row["test"]["score"] if row["test"] else None for row in transfer.verdict["table"]}
    rival, base = run.verdict["best_rival"], scores["seed"]
    assert base is not None
    setting = next(row["parameters"] for row in run.verdict["table"] if row["name"] == rival)
    with Sandbox(run.config.jail.limits) as box:
        judge = evaluator(run, AWAY, box, test=transfer.config.task.test)
        unchanged = judge.rival(rival, 0, setting, "test").score
    entrants = {
        "discovered, unchanged": scores[transfer.verdict["best"]],
        **{
            f"best of {row['name'].split('/')[0]}, unchanged": scores[row["name"]]
            for row in transfer.verdict["table"]
            if row["kind"] == "control"
        },
        "the run's best rival, unchanged": unchanged,
        "the best rival, tuned anew": scores[transfer.verdict["best_rival"]],
    }
    return {what: 0.0 if score is None else 100 * (score - base) for what, score in entrants.items()}


if __name__ == "__main__":
    main()
