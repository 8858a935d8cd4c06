"""One candidate: everything that the archive knows of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from selfdev.algorithms.source import unwrap_short
from selfdev.archive import Candidate, Evaluation, in_nats
from selfdev.candidates import candidate_name
from selfdev.errors import UserError
from selfdev.evaluation.objective import mean_by_group
from selfdev.evaluation.standing import LEARNING, repairs_of
from selfdev.factory.prompt import Prompt, base_of, correcting
from selfdev.report.terminal import facts, percent, python, table, visible

if TYPE_CHECKING:
    from selfdev.results import Run


def describe(run: "Run", name: str) -> dict[str, Any]:
    """What `selfdev show RUN CANDIDATE --json` prints; scores in 0..1, iterations from 1.

    Raises:
        UserError: the run has no such candidate, or it is a transfer, in which nobody wrote anything.
    """
    candidate = run.candidate(name)
    iteration = run.archive.iteration(candidate.arm, candidate.iteration)
    if iteration is None:
        raise UserError(
            f"{run.folder} is a transfer, and of '{name}' it has what it merges; `selfdev show RUN {name}` with the "
            "run that wrote it shows the rest"
        )
    arms, rounds = (LEARNING, *run.config.controls), range(run.config.iterations)
    pairs = [pair for arm in arms for t in rounds for pair in run.archive.pairs(arm, t)]
    mended = next((arm for arm in arms if repairs_of(arm) == candidate.arm), None)
    scored = [
        e
        for split in ("development", "test")
        for kind in ("candidate", "scaled")
        for e in run.archive.evaluations(kind, name, split)
    ]
    return {
        "name": candidate.name,
        "arm": candidate.arm,
        "iteration": candidate.iteration + 1,
        "temperature": None if mended else iteration.temperature,
        "repairs": mended and candidate_name(mended, candidate.iteration, candidate.number),
        "status": candidate.status,
        "failure": candidate.failure,
        "error": candidate.error,
        "nearest": candidate.nearest,
        "distance": candidate.distance,
        "canonical": candidate.canonical,
        "source": candidate.source,
        "text": candidate.text,
        "prompt": iteration.prompts[candidate.prompt],
        "corrects": _corrected(run, candidate, iteration.prompts),
        "tokens": len(candidate.tokens) or None,
        "log_prob": candidate.log_prob,
        "log_probs": None if candidate.log_probs is None else list(candidate.log_probs),
        "seconds": candidate.seconds,
        "finished": candidate.finished,
        "cut_off": candidate.cut_off,
        "evaluations": [_evaluation(run, e) for e in scored],
        "pairs": {
            "chosen": sum(pair.chosen == name for pair in pairs),
            "rejected": sum(pair.rejected == name for pair in pairs),
            "reasons": sorted({pair.reason for pair in pairs if pair.rejected == name}),
        },
    }


def describe_all(run: "Run") -> list[dict[str, Any]]:
    """What `selfdev show RUN --programs --json` prints: all programs that were written, in short.

    `score` is the best of those on development that its scales came to, in 0..1, `factor` the scale, and `questions`
    how many were asked: fewer where a program left a race early, whose score then ranks it nowhere.
    """
    scored = [
        e for kind in ("scaled", "candidate") for e in run.archive.evaluations(kind) if e.score is not None
    ]
    best = {
        e.subject: e for e in sorted(scored, key=lambda e: e.score or 0.0)
    }  # the last one of equals as written
    return [
        {
            "name": c.name,
            "status": c.status,
            "score": best[c.name].score if c.name in best else None,
            "factor": best[c.name].factor if c.name in best else None,
            "questions": best[c.name].questions if c.name in best else 0,
            "nearest": c.nearest,
            "distance": c.distance,
            "failure": c.failure,
            "error": c.error,
        }
        for c in sorted(run.candidates(), key=lambda c: c.arm != LEARNING)
    ]


def programs_page(programs: Sequence[dict[str, Any]]) -> RenderableType:
    """The same for people."""
    rows = table("", "score", "status", left=3)
    everything = max((each["questions"] for each in programs), default=0)
    for each in programs:
        what = _status(each)
        if 0 < each["questions"] < everything:
            what += f", left the race after {each['questions']} questions"
        if each["nearest"] and each["status"] != "failed":
            what += f", nearest {each['nearest']}"
        rows.add_row(
            each["name"], percent(each["score"]), Text(visible(what), overflow="ellipsis", no_wrap=True)
        )
    return rows


def _corrected(run: "Run", candidate: Candidate, prompts: Sequence[str]) -> str | None:
    """Name of the failing program that it was to correct, in a repair turn; None if it is no second attempt."""
    text = prompts[candidate.prompt]
    usual = Prompt(prompts[base_of(text, prompts)], (), run.config.prompt.form)
    beside = run.archive.candidates(candidate.arm, candidate.iteration)
    failing = [c for c in beside if c.source and c.error and prompts[c.prompt] == usual.text]
    shown = [c.name for c in failing if correcting(usual, c.source or "", c.error or "").text == text]
    return shown[0] if shown else None


def _evaluation(run: "Run", evaluation: Evaluation) -> dict[str, Any]:
    return {
        "split": evaluation.split,
        "factor": evaluation.factor,
        "score": evaluation.score,
        "questions": evaluation.questions,
        "first_score": evaluation.first_score,
        "first_questions": evaluation.first_questions,
        "failure": evaluation.failure,
        "seconds": evaluation.seconds,
        "groups": {}
        if evaluation.outcomes is None
        else mean_by_group(run.archive.groups_of(evaluation), evaluation.outcomes),
    }


def page(known: dict[str, Any]) -> RenderableType:
    """The same for people."""
    rows: dict[str, RenderableType] = {
        "candidate": Text(visible(known["name"]), style="bold"),
        "written_by": f"nobody: a small edit of {known['repairs']}, which fails"
        if known["repairs"]
        else f"{known['arm']}, iteration {known['iteration']}, at T={known['temperature']:.2f}",
        "status": Text(visible(_status(known))),
    }
    if known["distance"] is not None:
        rows["nearest"] = Text(visible(f"{known['nearest']}, distance {100 * known['distance']:.1f} %"))
    if known["corrects"] is not None:
        rows["corrects"] = Text(visible(f"{known['corrects']}, which the factory was shown with its error"))
    told = "tokens that the server did not tell" if known["tokens"] is None else f"{known['tokens']} tokens"
    rows["text"] = told + ("" if known["finished"] else ", cut off at the limit")
    if not known["text"]:
        rows["text"] = "none: " + ("cut off before its answer" if known["cut_off"] else "nothing was written")
    if known["log_prob"] is not None:
        rows["log_prob"] = f"{known['log_prob']:.1f} nats"
    if known["seconds"] is not None:
        rows["seconds"] = f"{known['seconds']:.1f} s until it was written, beside others"
    pairs = known["pairs"]
    reasons = f" ({', '.join(pairs['reasons'])})" if pairs["reasons"] else ""
    rows["pairs"] = Text(visible(f"chosen in {pairs['chosen']}, rejected in {pairs['rejected']}{reasons}"))
    parts: list[RenderableType] = [facts(**rows), ""]
    if known["evaluations"]:
        parts += [_scores(known["evaluations"]), ""]
    if known["source"] is None:
        return Group(
            *parts, "No function could be read from what was written:", "", Text(visible(known["text"]))
        )
    return Group(*parts, python(unwrap_short(known["source"])))


def _status(known: dict[str, Any]) -> str:
    status = known["status"] or "not screened yet"
    why = ": ".join(part for part in (known["failure"], known["error"]) if part)
    return f"{status}: {why}" if why else status


def _scores(evaluations: list[dict[str, Any]]) -> RenderableType:
    groups = list(dict.fromkeys(group for e in evaluations for group in e["groups"]))
    nats = in_nats(e["score"] for e in evaluations)
    rows = table(
        "log-likelihood in 0.01 nats a token" if nats else "accuracy in %",
        "score",
        *groups,
        "questions",
        "time",
    )
    for e in evaluations:
        shares = [percent(e["groups"].get(group)) for group in groups]
        scaled = "" if e["factor"] == 1 else f" x {e['factor']:g}"
        rows.add_row(
            e["split"] + scaled, percent(e["score"]), *shares, str(e["questions"]), f"{e['seconds']:.1f} s"
        )
    return rows
