"""What a run came to: the headline, who scored what, the winning program, where it lies and how to go on."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from selfdev.algorithms.source import unwrap_short
from selfdev.archive import FACTOR, in_nats
from selfdev.config import Config
from selfdev.evaluation.standing import LEARNING
from selfdev.lock import is_held
from selfdev.report.terminal import duration, facts, percent, points, python, table, visible

if TYPE_CHECKING:
    from selfdev.results import Run

YIELD = ("written", "working", "trivial", "known", "repeated", "new")
"""Counts of an iteration, in the order in which they are shown."""

_BY_ORDER = 0.01
"""Share of the output from which it is said that the order of the experts changes it."""

_SHOWN = 5
"""Finalists in the table; `--json` has all of them."""

_FOUND_BY = {
    "frozen": "found by sampling alone",
    "feedback": "found by sampling, shown its own best programs",
    "learning_feedback": "found by learning, shown its own best programs",
}
"""What a control's best program owes its score to."""

_SECTIONS = {
    "rival": "rivals, tuned on dev",
    "control": "controls, their best new",
    "discovered": "discovered",
}


def result(run: "Run") -> RenderableType:
    """The whole page of a run, finished or not."""
    summary = run.summary()
    parts: list[RenderableType] = [headline(summary, run), ""]
    if summary["table"]:
        parts += [scores_table(summary, run), "", *tasks_tables(summary, run)]
    if summary["iterations"]:
        parts += [_iterations(summary), ""]
    if summary["best"] is not None:
        parts += [*_winner(summary), ""]
    return Group(*parts, _where(summary, run))


def headline(summary: dict[str, Any], run: "Run") -> RenderableType:
    """What it is, how it ended, and what a reader must know before anything else."""
    record = summary["run"]
    title = f"{record['name']}: {record['preset']}, seed {record['seed']}, {duration(record['seconds'])}"
    lines = [(visible(title) + "\n", "dim")]
    if record["unsafe_sandbox"]:
        lines.append(("This run's programs ran with resource limits alone, without the jail.\n", "bold red"))
    for opening in record["test_opened_again"]:
        again = f"The test split was opened again (--again) on {opening['opened']}."
        if opening["headline_before"]:
            again += f" Before that, the verdict was: {opening['headline_before']}."
        lines.append((visible(again) + "\n", "bold yellow"))
    if record["status"] != "done":
        lines.append((f"{_how_far(summary, run)} The test questions decide at the end.", "bold yellow"))
    elif summary["best"] is None:
        lines.append((_no_winner(summary, run), "bold yellow"))
    else:
        lines.append((visible(f"{summary['headline']}."), "bold"))
        lines += [(visible(f"\n{line}"), "") for line in _gains(summary, run.config)]
    return Text.assemble(*lines)


def _how_far(summary: dict[str, Any], run: "Run") -> str:
    """Whether somebody is at work on a run that is not finished, and what of it there is."""
    going = "At work" if is_held(run.folder) else "Stopped before its end"
    if run.archive.run.status == "verdict" or "iterations" not in summary:  # a transfer writes nothing
        return f"{going}: its verdict is not reached."
    written = [i for i in summary["iterations"] if i["arm"] == LEARNING]
    if not written:
        return f"{going}: no iteration is written yet."
    return f"{going}: iteration {len(written)} of {run.config.iterations} is the last that is written."


def _gains(summary: dict[str, Any], config: Config) -> Iterator[str]:
    """Which part of the gain over the seed is sampling, and which is learning; a verdict of an older run has none."""
    gains = summary["gains"]
    if not gains or not gains["over_seed"] or not gains["controls"]:
        return
    unit = "hundredths of a nat a token" if _in_nats(summary) else "points"
    shown, learns = config.prompt.feedback, config.refinement.refit != "never"
    ours = " with ".join([*(["learning"] if learns else []), *(["prompt feedback"] if shown else [])])
    before = f" It was written before anything was {'learned' if learns else 'shown'}."
    first = before if gains["iteration"] == 1 else ""
    yield f"Gain over the seed on test: {points(gains['over_seed']['difference'])} {unit}.{first}"
    for control in gains["controls"]:
        more = control["best_minus_control"]
        if not more or not control["over_seed"]:
            continue  # not measured, as a note under the table says
        adds = f"{ours} adds" if control["arm"] == "frozen" else "the difference is"
        sure = "" if more["low"] > 0 or more["high"] < 0 else ": no difference shown"
        yield (
            f"  {control['candidate']}, {_FOUND_BY[control['arm']]}, gains "
            f"{points(control['over_seed']['difference'])}; {adds} {points(more['difference'])} "
            f"({100 * more['level']:.0f} % interval {points(more['low'])} to {points(more['high'])}{sure})"
        )
    yield (
        "  Compared is one program of each arm, its best on development. The intervals tell how the difference varies "
        "with the questions, and not how it varies from run to run."
    )


def _no_winner(summary: dict[str, Any], run: "Run") -> str:
    mine = [i for i in summary["iterations"] if i["arm"] == LEARNING]
    count = {kind: sum(i[kind] for i in mine) for kind in YIELD}
    failures = Counter(c.failure for c in run.candidates(LEARNING) if c.failure)
    common = ", ".join(f"{visible(name)} {times}" for name, times in failures.most_common(_SHOWN))
    why = "no new program keeps the floors (task.floors)" if summary["pareto"] else "no new program was found"
    unfinished = sum(c.cut_off for c in run.candidates(LEARNING))
    cut_off = f" {unfinished} were cut off at factory.max_new_tokens." if unfinished else ""
    return (
        f"There is no winner: {why}. "
        f"The learning factory wrote {count['written']} programs. {count['working']} of them work: "
        f"{count['trivial']} trivial, {count['known']} known, {count['repeated']} repeated, "
        f"{count['new']} new." + (f" Most of the others failed by {common}." if common else "") + cut_off
    )


def scores_table(summary: dict[str, Any], run: "Run") -> RenderableType:
    """Who scored what on development and on test, and the paired differences from the best rival."""
    level = f"{100 * run.config.verdict.level:.0f} %"
    rows = table(
        "log-likelihood in 0.01 nats a token" if _in_nats(summary) else "accuracy in %",
        "dev",
        "test",
        level,
        "diff",
        level,
        "p",
    )
    best = (run.verdict or {}).get("best_rival")
    kind, finalists = "seed", 0
    for row in summary["table"]:
        finalists += row["kind"] == "discovered"
        if finalists > _SHOWN:
            break
        if row["kind"] != kind:
            kind = row["kind"]
            rows.add_row(Text(_SECTIONS[kind], style="dim"))
        rows.add_row(*_row(row, is_best_rival=kind == "rival" and row["name"] == best))
    return Group(rows, Text("\n".join(_notes(summary, run, best)), style="dim"))


def _in_nats(summary: dict[str, Any]) -> bool:
    """Whether scores are log-likelihoods, and no shares of right answers."""
    return in_nats(row["dev"]["score"] for row in summary["table"])


def _notes(summary: dict[str, Any], run: "Run", best_rival: str | None) -> Iterator[str]:
    """What the table of scores leaves open."""
    finalists = [row for row in summary["table"] if row["kind"] == "discovered"]
    if best_rival is not None:
        yield f"diff: points from {best_rival}, the rival that was best on development (dev)."
    if any((row["against_best_rival"] or {}).get("p_adjusted") is not None for row in finalists):
        yield "p of a discovered program is Holm's, for all finalists together; the others' is not adjusted."
    if len(finalists) > _SHOWN:
        yield f"{len(finalists) - _SHOWN} more finalists were measured: --json lists them."
    for row in summary["table"]:
        if row.get("failure"):
            yield f"{row['name']} was not measured on test: {visible(row['failure'])}"
    if finalists and summary["best_on_test"] not in (None, finalists[0]["name"]):
        yield f"Best finalist on test, which is a selection on test: {summary['best_on_test']}."
    lost = finalists[0].get("shrinkage") if finalists else None
    if lost is not None:
        yield f"From dev to test, {finalists[0]['name']}'s gain on the seed changed by {points(-lost)} points."
    tuned = any(row["kind"] == "rival" for row in summary["table"]) or run.archive.evaluations("rival")
    if run.config.rivals and not tuned:
        yield "No rival was tuned: each gets as many evaluations as the programs had, and none had any."
    for arm in run.config.controls:
        if not any(row["name"].startswith(f"{arm}/") for row in summary["table"]):
            new = any(i["new"] for i in summary.get("iterations", []) if i["arm"] == arm)
            yield f"The control '{arm}' has no new program{' that keeps the floors' if new else ''}."


def tasks_tables(summary: dict[str, Any], run: "Run") -> Iterator[RenderableType]:
    """Test scores by task, and what each merge kept of the seed's; a verdict of an older run has none."""
    best_rival = (run.verdict or {}).get("best_rival")
    rows = [row for row in summary["table"] if row["test"] is not None and row.get("tasks")]
    discovered = [row for row in rows if row["kind"] == "discovered"][:1]
    shown = [row for row in rows if row["kind"] == "seed" or row["name"] == best_rival] + discovered
    if not shown:
        return
    groups = list(shown[0]["tasks"])
    tasks = table("test by task (points from the seed)", *groups)
    for row in shown:
        cells = [percent(row["tasks"][group]["test"]) for group in groups]
        for number, group in enumerate(groups):
            if group in row["retention"]:
                cells[number] += f" ({points(row['retention'][group]['difference'])})"
        tasks.add_row(visible(row["name"]), *cells)
    yield tasks
    yield ""


def _row(row: dict[str, Any], *, is_best_rival: bool) -> list[RenderableType]:
    test, against = row["test"], row["against_best_rival"]
    indent = "" if row["kind"] == "seed" else "  "
    cells = [
        indent + row["name"] + (f" x {row['parameters'][FACTOR]:g}" if FACTOR in row["parameters"] else ""),
        percent(row["dev"]["score"]),
        "-",
        "",
        "best" if is_best_rival else "-",
        "",
        "",
    ]
    if test is not None:
        cells[2:4] = percent(test["score"]), f"{percent(test['low'])}..{percent(test['high'])}"
    if against is not None:
        p = against["p"] if against["p_adjusted"] is None else against["p_adjusted"]
        interval = f"{points(against['low'])}..{points(against['high'])}"
        cells[4:] = points(against["difference"]), interval, "<0.001" if p < 0.001 else f"{p:.3f}"
    style = "green" if row["kind"] == "discovered" else "bold" if is_best_rival else ""
    return [Text(visible(cell), style=style) for cell in cells]


def _iterations(summary: dict[str, Any]) -> RenderableType:
    rows = table("iteration", "T", *YIELD, "best", "pairs", "time")
    rows.padding = (0, 1, 0, 0)  # all columns in 80 signs
    rows.columns[0].no_wrap = True
    ordered = sorted(summary["iterations"], key=lambda i: (i["iteration"], i["arm"] != LEARNING, i["arm"]))
    for i in ordered:
        rows.add_row(
            f"{i['iteration']} {i['arm']}",
            f"{i['temperature']:.2f}",
            *(str(i[count]) for count in YIELD),
            percent(i["best_dev"]),
            str(i["pairs"]) if i["pairs"] else "-",
            duration(sum(i["seconds"].values())),
        )
    for arm in dict.fromkeys(i["arm"] for i in ordered):
        its = [i for i in ordered if i["arm"] == arm]
        totals = [str(sum(i[kind] for i in its)) for kind in YIELD]
        time = duration(sum(sum(i["seconds"].values()) for i in its))
        rows.add_row(*(Text(cell, style="bold") for cell in (f"all {arm}", "", *totals, "", "", time)))
    nothing = [i for i in ordered if i["nothing_learned"]]
    lines = [
        f"After iteration {i['iteration']} the arm '{i['arm']}' learned nothing: {i['nothing_learned']}."
        for i in nothing
    ]
    variety = [
        f"Distinct behaviours of those that work, by iteration: {_by_arm(ordered, 'distinct', str)}.",
        f"Copies of what the prompt shows, in % of those that work: {_by_arm(ordered, 'copies', percent)}.",
    ]
    return Group(
        rows,
        *(Text(line, style="dim") for line in variety),
        *(Text(visible(line), style="yellow") for line in lines),
    )


def _by_arm(iterations: list[dict[str, Any]], column: str, shown: Callable[[Any], str]) -> str:
    arms = dict.fromkeys(i["arm"] for i in iterations)
    return "; ".join(
        f"{arm} {', '.join(shown(i[column]) for i in iterations if i['arm'] == arm)}" for arm in arms
    )


def _winner(summary: dict[str, Any]) -> list[RenderableType]:
    best = summary["best"]
    distance = "unknown" if best["distance"] is None else f"{100 * best['distance']:.0f} %"
    title = Text.assemble(("Best new program on development: ", ""), (visible(best["candidate"]), "bold"))
    real = best["distance_on_real_tensors"]
    near = (
        f"Nearest trivial or known program on probes: {best['nearest'] or '-'}, distance {distance} of the output. "
        f"On the experts themselves: {'unknown' if real is None else f'{100 * real:.0f} %'} from a linear combination."
    )
    notes = [Text(visible(near), style="dim")]
    if (best["change_by_order"] or 0) > _BY_ORDER:
        changed = percent(min(best["change_by_order"], 1))
        warning = (
            f"It goes by the order of the experts: if they change places, {changed} % of its output changes."
        )
        notes.append(Text(f"{warning} On other experts it may do something else.", style="yellow"))
    return [title, *notes, "", python(unwrap_short(best["source"]))]


def _best_rival(summary: dict[str, Any], run: "Run") -> str:
    """The rival that is best on development, as `selfdev merge` takes it; empty where there is none."""
    best = (run.verdict or {}).get("best_rival")
    settings = next((row["parameters"] for row in summary["table"] if row["name"] == best), None)
    if settings is None:
        return ""
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    ]
    targets = run.config.merge.targets
    merged = (
        [] if targets == "mlp" else [f"--targets {shlex.quote(targets)}"]
    )  # what `selfdev merge` merges itself
    return " ".join([f"--method {best}", *(f"-p {shlex.quote(word)}" for word in words), *merged])


def _where(summary: dict[str, Any], run: "Run") -> Table:
    record, folder = summary["run"], str(run.folder)
    steps = record["warm_start"]
    warm = (
        f"yes: {steps} supervised steps on the library's worked examples, before the first iteration"
        if steps
        else "none"
    )
    learned = ", adapters/ (what the factory learned)" if (run.folder / "adapters").is_dir() else ""
    lies = f"{folder}: archive.db (everything){learned}"
    rows: dict[str, RenderableType] = {"warm_start": warm, "lies_in": Text(visible(lies))}
    if run.config.refinement.refit == "never":
        shown = ", whose prompts show its own best programs" if run.config.prompt.feedback else ""
        rows["learning"] = (
            f"none: nothing was learned from the programs (refinement.refit: never); this is a search{shown}"
        )
    if (server := record["server"]) is not None:
        price = f", at a price of {server['price']:.4g}" if server["price"] else ""
        rows["server"] = f"{server['tokens_in']:,} tokens read, {server['tokens_out']:,} written{price}"
    if record["status"] != "done":
        unsafe = " --unsafe-sandbox" if summary["run"]["unsafe_sandbox"] else ""
        rows["go_on"] = Text(f"selfdev resume {folder}{unsafe}")
    if settings := _best_rival(summary, run):
        rows["best_rival"] = Text(visible(f"selfdev merge {settings} ..."))
    if summary["best"] is not None:
        rows["one_program"] = Text(f"selfdev show {folder} {summary['best']['candidate']}")
    rows["all_programs"] = Text(f"selfdev show {folder} --programs")
    rows["all_figures"] = Text(f"selfdev show {folder} --json")
    again = f"the command that began this run, with --set seed={record['seed'] + 1} and another --out, if it has one"
    rows["another_seed"] = Text(again)
    return facts(**rows)
