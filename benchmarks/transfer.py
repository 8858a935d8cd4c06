"""Do the quickstart's programs hold on models that no run has seen? Transfers of finished runs to the zoo `nano2`.

    python benchmarks/transfer.py runs/quickstart-1 runs/quickstart-2 runs/quickstart-3

It writes RUN/transfers/..., so give copies where a run's folder shall stay as it is. A transfer that is finished is
read and not made again. Prints Markdown for docs/results.md.
"""

import argparse
from pathlib import Path

import selfdev
from selfdev.errors import UserError
from selfdev.results import Transfer
from selfdev.zoo import zoo_models

ZOO = "nano2"
SHOWN = 3
"""Discovered programs in each table; `selfdev show --json` has all."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    for run in arguments.parse_args().runs:
        print_transfer(run, carried_over(run))


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


def print_transfer(run: Path, transfer: Transfer) -> None:
    summary = transfer.summary()
    there = {row["name"]: row for row in selfdev.open_run(run).summary()["table"]}
    print(f"\n### {run.name}: {summary['run']['seconds'] / 60:.1f} minutes\n\n{summary['headline']}.\n")
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


if __name__ == "__main__":
    main()
