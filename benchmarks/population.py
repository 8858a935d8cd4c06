"""Are the programs that an arm writes better where nobody chose by it? On the sealed test, and on unseen models.

    python benchmarks/population.py runs/benchmark/quickstart-* --out runs/benchmark/population.json

The verdict of a run is about its best programs. This is about all new ones of the last iteration, each at the scale at
which it was better on development, applied unchanged in two places: the run's own models and sealed test, whose verdict
is over; and the seed and experts of the zoo `nano2`, asked that task's test questions. Nothing is chosen by these
scores. A program that fails in a place counts there as the seed model, since a user would be left with that.

Several runs of one seed are averaged, whichever arms they have; differences between the arms are seed by seed, with
uncorrected 95 % intervals by Student's t over the seeds. Prints Markdown for docs/results.md. What is scored is kept in
--out, so a call that was cut off goes on.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median

from quickstart import interval
from selfdev.archive import FACTOR, Candidate
from selfdev.evaluation.evaluator import Evaluator, score_again
from selfdev.evaluation.standing import NORMED
from selfdev.evaluation.tasks import load_task
from selfdev.merging.relatives import find_relatives
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.results import Run, open_run
from selfdev.sandbox import Sandbox
from selfdev.zoo import zoo_models

HOME, AWAY = "the run's sealed test", "models that no run has seen"
QUESTIONS = 2046
"""Of each place, as many of every group."""

LEAST = 1.0
"""Points: what a gain must come to, to count."""

MEASURES = {
    "mean": "mean",
    "median": "median",
    "share": f"% of all written that are new and gain {LEAST:g} or more",
}
"""What is compared: the gains of one run's new programs, and how many of all that it wrote have one."""

Scores = dict[str, dict[str, float | None]]
"""Place, then program or `seed`; None where a program fails."""


class AfterTheVerdict:
    """A seal that lets the test split be opened once the run has nothing left to choose."""

    def __init__(self, run: Run):
        self.run = run

    def opened(self, task_name: str) -> None:
        """Raise if the run is not finished."""
        if self.run.archive.run.status != "done":
            raise SystemExit(f"{self.run.folder} is not finished, and its test of {task_name} is sealed")


def new_ones(run: Run) -> dict[str, list[tuple[Candidate, float]]]:
    """Of every arm the new programs of the last iteration, each with its better scale."""
    better: dict[str, tuple[float, float]] = {}
    scaled = [e for e in run.archive.evaluations("scaled") if e.number == NORMED]
    for each in run.archive.evaluations("candidate") + scaled:
        if each.score is not None:
            factor = float(each.parameters.get(FACTOR, 1.0))
            better[each.subject] = max(better.get(each.subject, (-1.0, 1.0)), (each.score, factor))
    return {
        arm: [
            (c, better[c.name][1])
            for c in run.candidates(arm)
            if c.status == "new" and c.iteration + 1 == run.config.iterations and c.name in better
        ]
        for arm in ("learning", *run.config.controls)
    }


def evaluator(
    run: Run, place: str, box: Sandbox, development: int | None = None, test: int = QUESTIONS
) -> Evaluator:
    """What scores in a place; with few development questions, where none are needed."""
    if place == HOME:
        merge, task = run.config.merge, run.config.task.name
        seed, experts = merge.seed, dict(merge.experts)
    else:
        seed, task = "zoo:nano2/seed", "nano2"
        experts = {name: f"zoo:nano2/{name}" for name in zoo_models("nano2")["experts"]}
    found = find_relatives(seed, experts)
    vectors = read_task_vectors(found.seed, found.experts, run.config.merge.targets)
    development = development or len(load_task(task).groups)
    judge = Evaluator(found.seed, vectors, load_task(task), development, box, run.config.seed)
    judge.open_test(test, AfterTheVerdict(run))
    return judge


def score(run: Run, done: Scores) -> Iterator[Scores]:
    """Score what is not `done` yet; gives everything after each program."""
    with Sandbox(run.config.jail.limits, workers=run.config.jail.workers) as box:
        for place in (HOME, AWAY):
            scores = done.setdefault(place, {})
            programs = [each for its in new_ones(run).values() for each in its]
            missing = [each for each in programs if each[0].name not in scores]
            if not missing and "seed" in scores:
                continue
            judge = evaluator(run, place, box)
            scores["seed"] = judge.seed("test").score
            yield done
            for candidate, factor in missing:
                number = 0 if factor == 1.0 else NORMED
                scores[candidate.name] = score_again(judge, candidate, "test", number, factor).score
                yield done


def print_place(place: str, runs: Sequence[tuple[Run, Scores]]) -> None:
    """What the arms' programs gain over the seed model in a place."""
    arms = dict.fromkeys(("learning", *(arm for run, _ in runs for arm in run.config.controls)))
    by_seed: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    programs: dict[str, set[tuple[int, str | None]]] = {arm: set() for arm in arms}
    failed: dict[str, set[tuple[int, str | None]]] = {arm: set() for arm in arms}
    for run, scores in runs:
        base = scores[place]["seed"]
        assert base is not None
        for arm, its in new_ones(run).items():
            gained = []
            for candidate, _ in its:
                found, what = scores[place][candidate.name], (run.config.seed, candidate.source)
                programs[arm].add(what)
                if found is None:
                    failed[arm].add(what)
                gained.append(0.0 if found is None else 100 * (found - base))
            share = 100 * sum(gain >= LEAST for gain in gained) / run.config.budgets[-1]
            by_seed["share", arm][run.config.seed].append(share)
            if gained:
                by_seed["mean", arm][run.config.seed].append(mean(gained))
                by_seed["median", arm][run.config.seed].append(median(gained))
    print(f"\n### {place[0].upper()}{place[1:]}: gain over the seed model, points\n")
    titles = " | ".join(f"{what} | learning - it" for what in MEASURES.values())
    print(f"| arm | distinct new programs | fail there | {titles} |")
    print("| --- " * (3 + 2 * len(MEASURES)) + "|")
    for arm in arms:
        cells = [arm, str(len(programs[arm])), str(len(failed[arm]))]
        for measure in MEASURES:
            theirs = {seed: mean(values) for seed, values in by_seed[measure, arm].items()}
            mine = {seed: mean(values) for seed, values in by_seed[measure, "learning"].items()}
            cells.append(f"{mean(theirs.values()):+.1f}" if theirs else "")
            apart = [mine[seed] - theirs[seed] for seed in theirs if seed in mine]
            if arm == "learning" or not apart:
                cells.append("")
                continue
            middle, half = interval(apart)
            cells.append(f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})")
        print("| " + " | ".join(cells) + " |")


def draw(runs: Sequence[tuple[Run, Scores]], path: Path) -> None:
    """Draw, of all that each arm wrote, the share that is new and gains at least so much."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, constrained_layout=True)
    arms = dict.fromkeys(("learning", *(arm for run, _ in runs for arm in run.config.controls)))
    for axis, place in zip(axes, (HOME, AWAY), strict=True):
        for arm in arms:
            gains, written = list[float](), 0
            for run, scores in runs:
                its = new_ones(run).get(arm)
                if its is not None:
                    written += run.config.budgets[-1]
                    base = scores[place]["seed"] or 0.0
                    gains += [100 * ((scores[place][c.name] or base) - base) for c, _ in its]
            gains = sorted((gain for gain in gains if gain > 0), reverse=True)
            shares = [100 * rank / written for rank in range(1, len(gains) + 1)]
            axis.step(gains, shares, where="pre", label=arm, linewidth=2)
        axis.set_xlim(0, None)
        axis.set_xlabel(f"points gained over the seed model: {place}")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("% of the programs written that are\nnew and gain at least so much")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--picture", type=Path, help="draw how the gains are spread")
    parser.add_argument("--out", type=Path, default=Path("runs/population.json"), help="keeps the scores")
    arguments = parser.parse_args()
    kept: dict[str, Scores] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    runs = []
    for folder in arguments.runs:
        run, name = open_run(folder), str(folder.resolve())
        for so_far in score(run, kept.setdefault(name, {})):
            kept[name] = so_far
            aside = arguments.out.with_suffix(".part")
            aside.write_text(json.dumps(kept))
            aside.replace(arguments.out)
        runs.append((run, kept[name]))
    for place in (HOME, AWAY):
        print_place(place, runs)
    if arguments.picture is not None:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
