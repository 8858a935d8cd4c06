"""lm-evaluation-harness on the same questions, for a second opinion (extra `eval`).

The harness runs on its own: its loading of the model, its prompts, its generation, its extraction and its metric.
From here it gets a task configuration, and the questions as files of JSON lines. For the tasks `gsm8k` and `math` the
configuration is the harness's own, with another place of its data; for other tasks, the declaration's fields under
the harness's names. Nothing is fetched.

What is taken from here all the same: which questions and few-shot examples there are (the harness knows no
development split), few-shot examples that differ by question outside `gsm8k`'s own test split (as text before the
prompt), and, but for the task `math`, the checkers `numeric` and `math-verify` (the harness has no such metrics).
"""

import functools
import importlib.util
import io
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdev.errors import UserError
from selfdev.evaluation.harness_tasks import pose
from selfdev.evaluation.measure import Measurement, ask, measure
from selfdev.evaluation.tasks import Task, load_task
from selfdev.evaluation.tasks.files import FEW_SHOT_SEED
from selfdev.evaluation.tasks.grading import Way
from selfdev.models.device import ON_CPU, Place
from selfdev.models.sources import Located, locate

BATCH = 8
"""Questions that the harness generates for at once."""


@dataclass(frozen=True)
class Verdict:
    """What the harness said of one question.

    Attributes:
        right: by the extraction that decides.
        extracted: what each extraction found, by name.
    """

    right: bool
    extracted: Mapping[str, str]


@dataclass(frozen=True)
class Opinion:
    """What the harness said, and what it took.

    Attributes:
        verdicts: by the content hash of the question.
        seconds: of generation; prompts, extraction and loading are left out.
        processor_seconds: the same, of all threads together.
    """

    verdicts: dict[str, Verdict]
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Agreement:
    """How far two sets of verdicts agree.

    Attributes:
        questions: how many were compared.
        verdicts: how many verdicts are the same.
        extracted: on how many every extraction found the same; None if the task is scored by `exact`, which writes
            nothing.
        score: the harness's share of right answers.
        differing: content hashes of the questions on which either differs.
    """

    questions: int
    verdicts: int
    extracted: int | None
    score: float
    differing: list[str]


def compare(
    source: str,
    task_name: str,
    split: str = "development",
    limit: int | None = None,
    batch: int = BATCH,
    place: Place = ON_CPU,
) -> tuple[Measurement, Agreement]:
    """Measure a model with `measure`, and with lm-evaluation-harness on the same questions.

    Args:
        source: where the model comes from.
        task_name: see `load_task`.
        split: `development` or `test`.
        limit: how many questions.
        batch: questions that the harness generates for at once.
        place: where both compute.

    Raises:
        UserError: lm-eval is not installed, the task is not scored by likelihood, or what `measure` refuses.
    """
    _check_installed()
    task = load_task(task_name)
    if task.grading.way is Way.LOGLIKELIHOOD:
        raise UserError(
            f"task '{task.name}' is scored by '{task.grading.way}'; lm-evaluation-harness is compared on answers, "
            "that is on tasks scored by 'generate' or 'exact'"
        )
    measured = measure(source, task_name, split, limit, place=place)
    return measured, agreement(measured, second_opinion(source, task, split, limit, batch, place).verdicts)


def second_opinion(
    source: str, task: Task, split: str, limit: int | None, batch: int = BATCH, place: Place = ON_CPU
) -> Opinion:
    """Let lm-evaluation-harness evaluate a model on the questions that `measure` asks.

    Args:
        source: where the model comes from.
        task: a task.
        split: `development` or `test`.
        limit: how many questions.
        batch: questions that the harness generates for at once.
        place: where it computes.

    Raises:
        UserError: what the harness's own task needs is not there.
    """
    questions, _ = ask(task, split, limit)
    model = locate(source)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        posed = pose(task, split, questions, Path(scratch))
        samples, seconds, processor_seconds = _run(posed.config, model, max(posed.places) + 1, batch, place)
    found: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    verdicts = {
        question.id: _verdict(found[i], list(task.grading.extractions), posed.metric)
        for question, i in zip(questions, posed.places, strict=True)
    }
    return Opinion(verdicts, seconds, processor_seconds)


def agreement(ours: Measurement, theirs: Mapping[str, Verdict]) -> Agreement:
    """Compare a measurement with the harness's verdicts on the same questions."""
    verdict = {a.question: a.outcome == theirs[a.question].right for a in ours.answers}
    extracted = {
        a.question: [a.extracted, *(other["extracted"] for other in a.others.values())]
        == list(theirs[a.question].extracted.values())
        for a in ours.answers
        if a.extracted is not None
    }
    return Agreement(
        questions=len(ours.answers),
        verdicts=sum(verdict.values()),
        extracted=sum(extracted.values()) if extracted else None,
        score=sum(theirs[answer.question].right for answer in ours.answers) / len(ours.answers),
        differing=[each for each in verdict if not (verdict[each] and extracted.get(each, True))],
    )


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'selfdev[eval]'")


def _run(
    config: str | dict[str, Any], model: Located, limit: int, batch: int, place: Place
) -> tuple[list[dict[str, Any]], float, float]:
    """Let the harness run; returns its samples, one a question and filter, and its seconds and processor seconds."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Timed(HFLM):  # type: ignore[misc]
        seconds = processor_seconds = 0.0

        def generate_until(self, *requests: Any, **options: Any) -> Any:
            began, processor_began = time.perf_counter(), time.process_time()
            try:
                return super().generate_until(*requests, **options)
            finally:
                self.seconds += time.perf_counter() - began
                self.processor_seconds += time.process_time() - processor_began

    timed = Timed(
        pretrained=str(model.folder),
        peft=model.adapter and str(model.adapter),
        tokenizer=str(model.tokenizer),
        dtype=place.dtype,
        device=str(place.device),
        batch_size=batch,
    )
    # What `simple_evaluate` does, but for its report on the machine, which takes longer than a small evaluation.
    loaded = _task_manager().load([config])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEW_SHOT_SEED)
    results = evaluate(lm=timed, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    [samples] = results["samples"].values()
    return list(samples), timed.seconds, timed.processor_seconds


@functools.cache
def _task_manager() -> Any:
    """Loads tasks; without the index of the harness's own thousands of files, since none is asked for by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _verdict(samples: Sequence[dict[str, Any]], names: Sequence[str], metric: str) -> Verdict:
    """One question's verdict, from its samples: one for each filter, or one alone."""
    by_filter = {sample["filter"]: sample for sample in samples}
    if not names:
        [sample] = samples
        return Verdict(bool(sample[metric]), {"text": _extracted(sample).strip()})
    return Verdict(bool(by_filter[names[0]][metric]), {name: _extracted(by_filter[name]) for name in names})


def _extracted(sample: dict[str, Any]) -> str:
    found = sample["filtered_resps"]
    [text] = found if isinstance(found, list) else [found]
    return str(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness offline, and its log and progress bars off the screen."""
    wanted = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
