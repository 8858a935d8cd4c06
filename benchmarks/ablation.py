"""What each part of learning does: a preset's learning arm alone, with one factor changed at a time.

    python benchmarks/ablation.py --seeds 1 2 3 --out runs/ablation
    python benchmarks/ablation.py --only preset no_imitation --picture docs/images/ablation.png
    python benchmarks/ablation.py --preset laptop --seeds 11 12 13 --only preset no_dpo --out runs/ablation-laptop
    python benchmarks/ablation.py --list

All of it takes a night. It can be stopped at any time and called anew: runs that are finished are read, one that was
cut off goes on. Two calls with the same --out share the work: each takes what the other does not have in hand. It
prints Markdown for docs/results.md, of what is finished so far: counts of the last iteration, as a mean over the seeds
and as the difference from the unchanged preset, seed by seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

from quickstart import SCORES, SHARES, interval, iterations, number
from selfdev.lock import held
from selfdev.results import Run, open_run

MEASURES = {**{column: f"% that {what}" for column, what in SHARES.items()}, "mean_dev": SCORES["mean_dev"]}
"""What the variants are compared in."""

ALONE = ("controls=[]", "rivals=[]", "scaling.programs=0", "task.test=64", "verdict.finalists=1")
"""The learning arm and nothing else: who wins is another benchmark's question."""

VARIANTS = {
    "preset": [],
    "loss_ipo": ["refinement.loss=ipo"],
    "loss_hinge": ["refinement.loss=hinge"],
    "loss_robust": ["refinement.loss=robust"],
    "loss_kto": ["refinement.loss=kto"],
    "no_dpo": ["preferences.pairs=0", "refinement.shun_examples=0"],
    "no_imitation": ["refinement.imitation.passes=0"],  # repairs are preferred to what they mend then
    "no_imitation_no_repairs": ["refinement.imitation.passes=0", "preferences.repairs=0"],
    "no_supervised_share": ["refinement.supervised=0", "refinement.rehearsal=0"],
    "no_failures_rejected": ["preferences.failures_as_rejected=false"],
    "no_novelty_pressure": ["preferences.copies_as_rejected=false", "refinement.shun_examples=0"],
    "no_gate": ["preferences.evidence=0"],
    "no_repairs": ["preferences.repairs=0"],
    "score_repairs": ["preferences.score_repairs=true"],
    "kl": ["refinement.kl=0.05"],
    "beta_0.5": ["refinement.beta=0.5"],
    "refit_continue": ["refinement.refit=continue"],
    "one_prompt": ["prompt.examples=fixed", "prompt.names=[median, row_top, inverse_distance]"],
    "temperature_0.6": ["factory.temperature=0.6"],
    "temperature_1.0": ["factory.temperature=1.0"],
    "stop_margin": ["refinement.stop_margin=10"],
    "pairs_each_8": ["preferences.pairs_each=8"],
    "pairs_32": ["preferences.pairs=32", "preferences.pairs_each=8"],
    "texts_not_alike": ["preferences.alike=1.0"],
}
"""Name, and what is changed in the preset."""


def run_once(preset: str, name: str, seed: int, out: Path) -> Run | None:
    """Run, resume or read one run; None if another process has it in hand."""
    folder = out / f"{name}-{seed}"
    if not (folder / "archive.db").exists():
        changes = [f"seed={seed}", *ALONE, *VARIANTS[name]]
        command = ["run", preset, "--out", str(folder), *(w for c in changes for w in ("--set", c))]
    elif (found := open_run(folder)).archive.run.status == "done":
        return found
    else:
        command = ["resume", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    if in_other_hands(folder):
        return None
    with (out / f"{folder.name}.log").open("a") as log:
        if subprocess.run([sys.executable, "-m", "selfdev", *command], stdout=log, stderr=log).returncode:
            if in_other_hands(folder):  # which took it at the same moment
                return None
            sys.exit(f"{folder} failed: see {log.name}")
    return open_run(folder)


def in_other_hands(folder: Path) -> bool:
    """Whether another process works on a run."""
    try:
        with held(folder):
            return False
    except BlockingIOError:
        return True


def last(run: Run) -> dict[str, object]:
    """The counts of the learning arm's last iteration."""
    mine = [row for row in iterations(run) if row["arm"] == "learning"]
    return max(mine, key=lambda row: int(str(row["iteration"])))


def table(runs: dict[str, dict[int, Run]]) -> None:
    """Print what each variant came to in its last iteration, and its difference from the preset."""
    columns = [f"{what} | difference" for what in MEASURES.values()]
    print(f"| variant | seeds | {' | '.join(columns)} | entropy, nats | copies, % | minutes |")
    print("| --- " * (5 + 2 * len(columns)) + "|")
    for name, its in runs.items():
        cells = [name, str(len(its))]
        for column in MEASURES:
            values = {seed: number(last(run), column) for seed, run in its.items()}
            base = {seed: number(last(run), column) for seed, run in runs.get("preset", {}).items()}
            apart = [value - base[seed] for seed, value in values.items() if seed in base]
            cells.append(f"{mean(values.values()):.1f}")
            cells.append("" if name == "preset" or not apart else difference(apart))
        cells.append(f"{mean(number(last(run), 'entropy') for run in its.values()):.2f}")
        cells.append(f"{mean(number(last(run), 'copies') for run in its.values()):.0f}")
        cells.append(f"{mean(run.archive.run.seconds for run in its.values()) / 60:.1f}")
        print("| " + " | ".join(cells) + " |")


def difference(apart: list[float]) -> str:
    """The mean of differences, with its 95 % interval if there are several."""
    middle, half = interval(apart)
    return f"{middle:+.1f}" + (f" ({middle - half:+.1f} to {middle + half:+.1f})" if len(apart) > 1 else "")


def draw(runs: dict[str, dict[int, Run]], path: Path) -> None:
    """Draw the shares of each variant's last iteration: a bar for the mean, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(runs)
    size = (17, 1.2 + 0.32 * len(names))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, sharey=True, constrained_layout=True)
    for axis, (column, what) in zip(axes, MEASURES.items(), strict=True):
        for place, its in enumerate(runs.values()):
            values = [number(last(run), column) for run in its.values()]
            axis.barh(place, mean(values), color="tab:blue" if place else "tab:gray", alpha=0.5)
            axis.plot(values, [place] * len(values), "o", color="black", markersize=4, alpha=0.6)
        if column in SCORES:  # from zero on all bars would be of one length
            axis.set_xlim(
                left=min(number(last(run), column) for its in runs.values() for run in its.values()) - 2
            )
        axis.set_title(what, fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quickstart", help="which one's learning arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--list", action="store_true", help="name the variants, and run nothing")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()
    if arguments.list:
        for name, changes in VARIANTS.items():
            print(f"{name}: {', '.join(changes) or 'nothing changed'}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[int, Run]] = {}
    for seed in arguments.seeds:  # seed by seed, so that all variants have the first seeds when it is stopped
        for name in arguments.only:
            found = run_once(arguments.preset, name, seed, arguments.out)
            if found is not None:
                runs.setdefault(name, {})[seed] = found
                print(f"{name}, seed {seed}, is done", file=sys.stderr, flush=True)
    table({name: runs[name] for name in arguments.only if name in runs})
    if arguments.picture is not None:
        draw({name: runs[name] for name in arguments.only if name in runs}, arguments.picture)


if __name__ == "__main__":
    main()
