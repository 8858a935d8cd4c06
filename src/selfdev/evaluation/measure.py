"""Measuring one model on one task, outside any run: `selfdev evaluate`."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from selfdev.errors import UserError
from selfdev.evaluation.objective import Objective, mean_by_group
from selfdev.evaluation.score_cache import ScoreCache, score_key
from selfdev.evaluation.scoring import Scored, prepare
from selfdev.evaluation.statistics import score_interval
from selfdev.evaluation.tasks import Question, Split, Task, load_task
from selfdev.evaluation.tasks.grading import Way
from selfdev.models.device import ON_CPU, Place
from selfdev.models.folder import load_model, load_tokenizer, weights_hash
from selfdev.models.sources import Located, locate

ORDER_SEED = 0
"""Of the order of development questions: `--limit` takes the first ones, for every model the same."""


@dataclass(frozen=True)
class Answer:
    """What became of one question.

    Attributes:
        question: its content hash.
        group: its sub-task.
        where: file and line, if it came from a file.
        outcome: right or wrong, or nats a token.
        extracted: what the deciding extraction found; None if nothing was written.
        gold: what it was compared with.
        text: what the model wrote, up to the stop string; None if nothing was written.
        others: by the name of each further extraction, what it found and whether that is right.
    """

    question: str
    group: str
    where: str
    outcome: bool | float
    extracted: str | None
    gold: str
    text: str | None
    others: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A model's score on a task, question by question.

    Attributes:
        model: where it came from.
        weights: their sha256.
        task: name.
        scoring: the way.
        split: `development` or `test`.
        score: the mean over the groups of their mean outcome; 0..1, or nats a token.
        low: lower end of the 95 % interval of the score, see `score_interval`; None where it is no share.
        high: its upper end.
        groups: the mean outcome of each.
        extractions: the share of right answers by each extraction, if the task has several.
        answers: one a question.
        seconds: of scoring, loading left out.
        processor_seconds: the same, of all threads together.
        place: the device, and the type of the weights there.
        note: what the reader must know.
    """

    model: str
    weights: str
    task: str
    scoring: str
    split: str
    score: float
    low: float | None
    high: float | None
    groups: dict[str, float]
    extractions: dict[str, float]
    answers: list[Answer]
    seconds: float
    processor_seconds: float
    place: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"questions": len(self.answers)}


class Unsealed:
    """The seal of a test split that no run holds: it opens, for it was asked for by name."""

    def __init__(self) -> None:
        self.note = ""

    def opened(self, task_name: str) -> None:
        """Take note of the opening."""
        self.note = (
            f"the test split of '{task_name}' was opened outside any run, and no archive records it; whatever is "
            "chosen by these scores is no longer untouched by the test"
        )


def measure(
    source: str,
    task_name: str,
    split: str = "development",
    limit: int | None = None,
    cache: ScoreCache | None = None,
    place: Place = ON_CPU,
) -> Measurement:
    """Score a model on a task.

    Args:
        source: where the model comes from, which may be a LoRA adapter; see `selfdev.models.sources`.
        task_name: see `load_task`.
        split: `development`, or `test` if it is to be opened.
        limit: how many questions; all that the split has, the groups balanced, by default.
        cache: where scores that were measured before are looked up, and new ones kept; by default all are measured.
        place: where the model computes.

    Raises:
        UserError: a bad task, model, split or limit; found before the model runs.
        ScoringError: the model gives no usable logits.
    """
    task = load_task(task_name)
    questions, note = ask(task, split, limit)
    found = locate(source)
    key = score_key(found, questions, task.grading, place) if cache is not None else ""
    known = cache.get(key) if cache is not None else None
    if known is not None:
        scored, seconds = known.scored, known.seconds
        note = "; ".join(filter(None, (note, f"measured on {known.made} and kept; --fresh measures anew")))
    else:
        model = load_model(found.folder, place.dtype, found.adapter).to(place.device)
        tokenizer = load_tokenizer(found.tokenizer)
        scoring = prepare(model, tokenizer, questions, task.grading)
        began, processor_began = time.perf_counter(), time.process_time()
        scored = scoring(model)
        seconds = time.perf_counter() - began, time.process_time() - processor_began
        if cache is not None:
            try:
                cache.put(key, scored, seconds)
            except OSError as error:
                note = "; ".join(filter(None, (note, f"not kept for the next time: {error}")))
    return _measurement(source, found, task, split, questions, scored, seconds, place, note)


def ask(task: Task, split: str, limit: int | None) -> tuple[list[Question], str]:
    """The questions of a split, and what is to be said about their opening.

    Raises:
        UserError: no such split, or not so many questions.
    """
    if split not in (Split.DEVELOPMENT, Split.TEST):
        raise UserError(f"no split '{split}' to evaluate on; there are development and test")
    count = task.size(Split(split)) if limit is None else limit
    if split == Split.DEVELOPMENT:
        return task.development(count, ORDER_SEED), ""
    seal = Unsealed()
    return task.open_test(count, seal), seal.note


def _measurement(
    source: str,
    found: Located,
    task: Task,
    split: str,
    questions: Sequence[Question],
    scored: Scored,
    seconds: tuple[float, float],
    place: Place,
    note: str,
) -> Measurement:
    its_group = [question.group for question in questions]
    groups = mean_by_group(its_group, scored.outcomes.tolist())
    low = high = None
    if scored.outcomes.dtype == torch.bool:
        low, high = score_interval(scored.outcomes, its_group, families=task.families(questions))
    answers = [_answer(i, question, scored) for i, question in enumerate(questions)]
    names = list(task.grading.extractions) if task.grading.way is Way.GENERATE else []
    extractions = {
        name: sum(reply.readings[name].right for reply in scored.replies) / len(questions) for name in names
    }
    return Measurement(
        model=source,
        weights=weights_hash(*found),
        task=task.name,
        scoring=str(task.grading.way),
        split=split,
        score=Objective().aggregate(groups),
        low=low,
        high=high,
        groups=groups,
        extractions=extractions if len(extractions) > 1 else {},
        answers=answers,
        seconds=seconds[0],
        processor_seconds=seconds[1],
        place=str(place),
        note=note,
    )


def _answer(i: int, question: Question, scored: Scored) -> Answer:
    outcome = scored.outcomes[i].item()
    if not scored.replies:
        return Answer(question.id, question.group, question.where, outcome, None, question.gold, None, {})
    reply = scored.replies[i]
    (_, first), *others = reply.readings.items()
    return Answer(
        question.id,
        question.group,
        question.where,
        outcome,
        first.extracted,
        question.answer,
        reply.text,
        {name: asdict(reading) for name, reading in others},
    )
