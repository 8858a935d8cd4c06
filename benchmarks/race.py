"""What a race costs and how often it errs.

python benchmarks/race.py --simulate [--races 10000] [--picture docs/images/race.png]
python benchmarks/race.py --record outcomes.npz RUN... [--questions 3072] [--entrants 573]
python benchmarks/race.py --replay outcomes.npz RUN... [--keep 3]

`--simulate` draws outcomes of entrants whose true shares are known, and counts who leaves wrongly under the rule of
`selfdev.evaluation.race` and under the naive one, which tests everybody against whoever is best but `keep - 1` at the
moment. `--record` scores the programs of finished runs on the nano zoo, and random settings of the human-designed
methods and random linear combinations beside them, all on the same questions. `--replay` races what was recorded,
or the new programs of finished runs, in ten question orders, against full evaluation. Both print Markdown for
docs/results.md.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdev.algorithms.library import methods
from selfdev.archive import Archive, Candidate
from selfdev.evaluation.evaluator import Evaluator, Refused
from selfdev.evaluation.race import Race, log_e_value, prefixes, question_order
from selfdev.evaluation.tasks import load_task
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.sandbox import Limits, Sandbox
from selfdev.zoo import zoo_models

ALPHA, FIRST, GROWTH = 0.05, 60, 1.2

# --- simulated races

ENTRANTS, QUESTIONS = 30, 600
EFFECTS = (0.0, 0.05, 0.15)
"""By how much the best entrants' share of right answers is above the others'."""
KEEPS = (1, 5, 15)
BATCH = 100
"""Races at once."""

OTHERS = ~np.eye(ENTRANTS, dtype=bool)

Booleans = NDArray[np.bool_]


def simulate(races: int, picture: Path | None) -> None:
    looks = prefixes([0] * QUESTIONS, 20, 1.1)
    print(f"{races} races, {ENTRANTS} entrants, {QUESTIONS} questions, {len(looks)} looks, alpha {ALPHA}\n")
    print(
        "| effect, points | keep | rule | a best one left wrongly, % | the others left, % | questions asked, % |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    rates = dict[tuple[float, int, str], NDArray[np.float64]]()
    for effect in EFFECTS:
        for (keep, rule), (wrong, rightly, asked) in error_rates(races, effect, looks).items():
            rates[effect, keep, rule] = wrong
            others = f"{100 * rightly:.1f}" if effect else ""
            print(
                f"| {100 * effect:.0f} | {keep} | {rule} | {100 * wrong[-1]:.2f} | {others} | {100 * asked:.0f} |"
            )
    if picture is not None:
        draw(rates, looks, picture)


def error_rates(
    races: int, effect: float, looks: list[int]
) -> dict[tuple[int, str], tuple[NDArray[np.float64], float, float]]:
    """For each `keep` and rule: the share of the best that left by each look, of the others, of questions asked."""
    table, rng = e_value_table(QUESTIONS), np.random.default_rng(0)
    found = {}
    for keep in KEEPS:
        best = np.arange(ENTRANTS) < (keep if effect else ENTRANTS)
        wrong = {rule: np.zeros(len(looks)) for rule in RULES}
        rightly, asked = dict.fromkeys(RULES, 0.0), dict.fromkeys(RULES, 0.0)
        for _ in range(races // BATCH):
            outcomes = draw_outcomes(rng, best, effect)
            active = {rule: np.ones((BATCH, ENTRANTS), dtype=bool) for rule in RULES}
            log_e = {rule: np.full((BATCH, ENTRANTS, ENTRANTS), -np.inf, dtype=np.float32) for rule in RULES}
            for number, (before, size) in enumerate(pairwise([0, *looks])):
                right = outcomes[:, :, :size].astype(np.float32)
                only = (right @ (1 - right).transpose(0, 2, 1)).astype(int)
                now, total = table[only, only.transpose(0, 2, 1)], right.sum(-1)
                for rule, leaves in RULES.items():
                    still = active[rule]
                    asked[rule] += still.sum() * (size - before)
                    # Where one has left, the e-value stands.
                    np.copyto(log_e[rule], now, where=still[:, :, None] & still[:, None, :] & OTHERS)
                    still &= ~leaves(log_e[rule], total, still, keep)
                    wrong[rule][number] += (~still[:, best]).sum()
            for rule in RULES:
                rightly[rule] += (~active[rule][:, ~best]).sum()
        for rule in RULES:
            found[keep, rule] = (
                wrong[rule] / (races * best.sum()),
                rightly[rule] / (races * max(1, int((~best).sum()))),
                asked[rule] / (races * ENTRANTS * QUESTIONS),
            )
    return found


def draw_outcomes(rng: np.random.Generator, best: Booleans, effect: float) -> Booleans:
    """Right or wrong, (BATCH, ENTRANTS, QUESTIONS); questions are easy or hard for all, so outcomes often agree."""
    easy = rng.beta(1.2, 0.8, size=(BATCH, 1, QUESTIONS)) * (1 - effect)  # the mean share is 0.6
    share = easy + np.where(best, effect, 0.0)[None, :, None]
    drawn: Booleans = rng.random((BATCH, len(best), QUESTIONS)) < share
    return drawn


def e_value_table(most: int) -> NDArray[np.float32]:
    counts = np.arange(most + 1, dtype=float)
    return log_e_value(counts[:, None], counts[None, :]).astype(np.float32)


def race_rule(
    log_e: NDArray[np.float32], total: NDArray[np.float32], active: Booleans, keep: int
) -> Booleans:
    """`selfdev.evaluation.race.leaving`, for many races at once."""
    smallest = np.partition(log_e, ENTRANTS - keep, axis=-1)[
        ..., : ENTRANTS - keep + 1
    ]  # and the diagonal's zero
    with np.errstate(over="ignore"):
        left: Booleans = np.exp(smallest).sum(-1) >= (ENTRANTS - keep) / ALPHA
    return left


def naive_rule(
    log_e: NDArray[np.float32], total: NDArray[np.float32], active: Booleans, keep: int
) -> Booleans:
    """Everybody against whoever has the `keep`-th best score at the moment."""
    order = np.argsort(-np.where(active, total, -1), axis=-1, kind="stable")
    rival = order[:, keep - 1]
    against = np.take_along_axis(log_e, rival[:, None, None], axis=2)[..., 0]
    worse = total < np.take_along_axis(total, rival[:, None], axis=1)
    left: Booleans = active & worse & (against >= -np.log(ALPHA))
    return left


RULES: dict[str, Callable[..., Booleans]] = {"race": race_rule, "naive": naive_rule}


def draw(rates: dict[tuple[float, int, str], NDArray[np.float64]], looks: list[int], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(EFFECTS), figsize=(10.5, 3.4), sharey=True, layout="constrained")
    for panel, effect in zip(panels, EFFECTS, strict=True):
        for keep, colour in zip(KEEPS, ("C0", "C1", "C2"), strict=True):
            for rule, style in (("race", "-"), ("naive", ":")):
                label = f"{rule}, keep {keep}"
                panel.plot(looks, 100 * rates[effect, keep, rule], style, color=colour, label=label)
        panel.axhline(100 * ALPHA, color="grey", linewidth=0.8, linestyle="--")
        title = f"the best are better by {100 * effect:.0f} points" if effect else "all are equal"
        panel.set(title=title, xlabel="questions answered", yscale="symlog", yticks=[0, 1, 5, 10, 50])
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("best entrants that left wrongly, %")
    panels[-1].legend(fontsize="small", ncols=2)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


# --- recorded outcomes


def record(out: Path, runs: list[Path], questions: int, entrants: int) -> None:
    """Score programs of runs, random library merges and random linear ones, near and wide, on the same questions."""
    models = zoo_models("nano")
    vectors = read_task_vectors(models["seed"], models["experts"], "mlp")
    count = len(models["experts"])
    kinds, outcomes = list[str](), list[tuple[float, ...]]()
    with Sandbox(Limits()) as box:
        scorer = Evaluator(models["seed"], vectors, load_task("nano"), questions, box, 0)
        share = (entrants - len(sources := programs(runs))) // 3
        merges = [("program", partial(scorer.candidate, c)) for c in sources]
        draws = {
            "library": library_draws(share, count),
            "linear": linear_draws(share, count, -0.5, 1.0),
            "wide": linear_draws(share, count, -2.0, 3.0),
        }
        for kind, settings in draws.items():
            merges += [(kind, partial(scorer.rival, name, 0, setting)) for name, setting in settings]
        for done, (kind, evaluate) in enumerate(merges):
            print(f"{done + 1} of {len(merges)}", end="\r", file=sys.stderr)
            try:
                found = evaluate()
            except Refused as refused:
                print(f"\n{refused}", file=sys.stderr)
                continue
            if found.outcomes is not None:
                kinds.append(kind)
                outcomes.append(found.outcomes)
        groups = [question.group for question in scorer.questions("development")]
    np.savez_compressed(out, outcomes=np.array(outcomes), kinds=np.array(kinds), groups=np.array(groups))


def programs(runs: list[Path]) -> list[Candidate]:
    """The new programs of all runs, each text once."""
    found = dict[str, Candidate]()
    for folder in runs:
        with Archive.open(folder / "archive.db", read_only=True) as archive:
            for candidate in archive.candidates():
                if candidate.status == "new" and candidate.source:
                    found.setdefault(
                        candidate.canonical or candidate.source, replace(candidate, name=str(len(found)))
                    )
    return list(found.values())


def library_draws(count: int, experts: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Random settings of the methods that have any, in turns."""
    draw = random.Random(0)
    tuned = [m for m in methods().values() if m.parameters and m.experts in (None, experts)]
    for number in range(count):
        chosen = tuned[number % len(tuned)]
        yield chosen.name, chosen.sample(draw, experts)


def linear_draws(count: int, experts: int, low: float, high: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Random weights for every expert."""
    draw = random.Random(0)
    for _ in range(count):
        yield "weighted_task_arithmetic", {"weights": [draw.uniform(low, high) for _ in range(experts)]}


# --- recorded outcomes, raced


def replay(path: Path, keep: int, seeds: int = 10) -> None:
    """Race what `record` wrote, in several mixes, or the new programs of a finished run."""
    print(f"\n{path}, keep {keep}, alpha {ALPHA}, first {FIRST}, growth {GROWTH}\n")
    print(
        "| entrants | number | questions | spread | near the best | same winner | questions asked, % | stayed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, outcomes, groups in mixes(path):
        score = outcomes.mean(1)
        spread = f"{100 * score.std():.1f}, {100 * np.median(score):.0f} to {100 * score.max():.1f}"
        raced = [raced_once(outcomes, groups, seed, keep) for seed in range(seeds)]
        same, asked, stayed = (np.mean(each) for each in zip(*raced, strict=True))
        print(
            f"| {name} | {len(outcomes)} | {len(groups)} | {spread} | {(score > score.max() - 0.03).sum()} "
            f"| {seeds * same:.0f} of {seeds} | {100 * asked:.0f} | {stayed:.0f} |"
        )


def mixes(path: Path) -> Iterator[tuple[str, Booleans, list[str]]]:
    """Name, outcomes and the questions' groups of each set of entrants."""
    if path.is_dir():
        with Archive.open(path / "archive.db", read_only=True) as archive:
            outcomes = [
                e.outcomes for e in archive.evaluations("candidate") if e.outcomes and e.asked is None
            ]
            yield "new programs", np.array(outcomes, dtype=bool), archive.groups("development")
        return
    recorded = np.load(path)
    for kinds in (("library",), ("linear",), ("wide",), ("library", "linear", "wide")):
        chosen = np.isin(recorded["kinds"], ["program", *kinds])
        yield "programs, " + ", ".join(kinds), recorded["outcomes"][chosen], recorded["groups"].tolist()


def raced_once(outcomes: Booleans, groups: list[str], seed: int, keep: int) -> tuple[bool, float, int]:
    """Whether the winner is that of full evaluation, the share of questions asked, and how many answered all."""
    ordered = outcomes[:, question_order(groups, seed)]
    race, asked, before = Race(len(outcomes), keep, ALPHA), 0, 0
    for size in prefixes(groups, FIRST, GROWTH):
        asked += int(race.active.sum()) * (size - before)
        before = size
        race.look(ordered[race.active, :size])
    total = outcomes.sum(1)
    winner = np.flatnonzero(race.active)[total[race.active].argmax()]
    return bool(total[winner] == total.max()), asked / outcomes.size, int(race.active.sum())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--simulate", action="store_true")
    arguments.add_argument("--races", type=int, default=10_000)
    arguments.add_argument("--picture", type=Path)
    arguments.add_argument("--replay", type=Path, nargs="+", default=[])
    arguments.add_argument("--keep", type=int, default=3)
    arguments.add_argument("--record", type=Path)
    arguments.add_argument("runs", type=Path, nargs="*")
    arguments.add_argument("--questions", type=int, default=3072)
    arguments.add_argument("--entrants", type=int, default=573)
    options = arguments.parse_args()
    if options.simulate:
        simulate(options.races, options.picture)
    if options.record is not None:
        record(options.record, options.runs, options.questions, options.entrants)
    for path in options.replay:
        replay(path, options.keep)


if __name__ == "__main__":
    main()
