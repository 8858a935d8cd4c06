"""lm-evaluation-harness on the same questions, for a second opinion (extra `eval`).

The harness runs on its own: its loading of the model, its prompts, its generation, its extraction and its metric.
From here it gets a task configuration, and the questions as files of JSON lines. For the task `gsm8k` the
configuration is the harness's own, with another place of its data; for other tasks, the declaration's fields under
the harness's names. Nothing is fetched.

What is taken from here all the same: which questions and few-shot examples there are (the harness knows no
development split), few-shot examples that differ by question outside `gsm8k`'s own test split (as text before the
prompt), and the checkers `numeric` and `math-verify` (the harness has no metric for them).
"""

import functools
import importlib.util
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdev.errors import UserError
from selfdev.evaluation.measure import Measurement, ask, measure
from selfdev.evaluation.tasks import Question, Task, load_task
from selfdev.evaluation.tasks.checkers import Exact
from selfdev.evaluation.tasks.files import FEW_SHOT_SEED, FileTask
from selfdev.evaluation.tasks.grading import Way
from selfdev.models.sources import resolve

BATCH = 8
"""Questions that the harness generates for at once."""


@dataclass(frozen=True)
class Verdict:
    """What the harness said of one question, by the extraction that decides."""

    extracted: str
    right: bool


@dataclass(frozen=True)
class Agreement:
    """How far two sets of verdicts agree.

    Attributes:
        questions: how many were compared.
        verdicts: how many verdicts are the same.
        extracted: how many extracted answers are the same; None if the task is scored by `exact`, which writes none.
        score: the harness's share of right answers.
        differing: content hashes of the questions on which either differs.
    """

    questions: int
    verdicts: int
    extracted: int | None
    score: float
    differing: list[str]


def compare(
    source: str, task_name: str, split: str = "development", limit: int | None = None, batch: int = BATCH
) -> tuple[Measurement, Agreement]:
    """Measure a model with `measure`, and with lm-evaluation-harness on the same questions.

    Args:
        source: where the model comes from.
        task_name: see `load_task`.
        split: `development` or `test`.
        limit: how many questions.
        batch: questions that the harness generates for at once.

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
    measured = measure(source, task_name, split, limit)
    return measured, agreement(measured, harness_verdicts(source, task, split, limit, batch))


def harness_verdicts(
    source: str,
    task: Task,
    split: str,
    limit: int | None,
    batch: int = BATCH,
    spent: list[float] | None = None,
) -> dict[str, Verdict]:
    """Let lm-evaluation-harness evaluate a model on the questions that `measure` asks.

    Args:
        source: where the model comes from.
        task: a task.
        split: `development` or `test`.
        limit: how many questions.
        batch: questions that the harness generates for at once.
        spent: gets the seconds that generation took, prompts, extraction and loading left out.

    Returns:
        Content hash of each question -> the harness's verdict.
    """
    questions, _ = ask(task, split, limit)
    folder = resolve(source)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        config: str | dict[str, Any]
        if _is_stock(task, split):
            config, take = _stock(task, questions, Path(scratch))
        else:
            config = _configured(task, questions, Path(scratch))
            take = list(range(len(questions)))
        samples, seconds = _run(config, folder, max(take) + 1, batch)
    if spent is not None:
        spent.append(seconds)
    decisive = next(iter(task.grading.extractions), "text")
    found = {sample["doc_id"]: sample for sample in samples if sample["filter"] == decisive}
    return {question.id: _verdict(found[i]) for question, i in zip(questions, take, strict=True)}


def agreement(ours: Measurement, theirs: dict[str, Verdict]) -> Agreement:
    """Compare a measurement with the harness's verdicts on the same questions."""
    verdict = {a.question: a.outcome == theirs[a.question].right for a in ours.answers}
    extracted = {
        a.question: a.extracted == theirs[a.question].extracted
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


def _is_stock(task: Task, split: str) -> bool:
    """Whether the harness's own task asks these questions in this way."""
    return isinstance(task, FileTask) and task.name == "gsm8k" and split == "test"


def _stock(task: Task, questions: Sequence[Question], scratch: Path) -> tuple[str, list[int]]:
    """The harness's own `gsm8k` on local files; and which of its questions are ours, by position."""
    assert isinstance(task, FileTask)
    train, test = task.rows["few_shot_data"], task.rows["test_data"]
    data = {
        "train": _write(scratch / "train.jsonl", [dict(row.fields) for row in train]),
        "test": _write(scratch / "test.jsonl", [dict(row.fields) for row in test]),
    }
    place = {row.where: i for i, row in enumerate(test)}
    own = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks/gsm8k/gsm8k.yaml"  # type: ignore
    config = {
        "include": str(own),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": _dataset(data, scratch),
    }
    file = scratch / "gsm8k.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return str(file), [place[question.where] for question in questions]


def _configured(task: Task, questions: Sequence[Question], scratch: Path) -> dict[str, Any]:
    """A configuration of the harness that asks these questions in the task's way."""
    grading = task.grading
    docs: list[dict[str, Any]] = [
        {"context": q.context, "prompt": q.prompt, "target": q.gold, "answer": q.answer} for q in questions
    ]
    config: dict[str, Any] = {
        "task": f"selfdev_{task.name}",
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}{{prompt}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": list(grading.stop),
            "max_gen_toks": grading.max_new_tokens,
            "do_sample": False,
        },
        "filter_list": _filters(task),
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    files = {"test": docs}
    if isinstance(task, FileTask) and task.declaration.few_shot_draw != "each":
        # The harness renders the declaration's templates and puts the examples before the prompt itself.
        declared, examples = task.declaration, task.examples()
        rows = {row.where: row for role in ("development_data", "test_data") for row in task.rows[role]}
        files = {"test": [dict(rows[question.where].fields) for question in questions]}
        config |= {"doc_to_text": declared.prompt, "doc_to_target": declared.answer or declared.target}
        if examples:
            files["train"] = [dict(row.fields) for row in examples]
            config |= {
                "num_fewshot": len(examples),
                "fewshot_split": "train",
                "training_split": "train",
                "target_delimiter": declared.delimiter,
                "fewshot_delimiter": declared.separator,
                "fewshot_config": {"sampler": "first_n", "doc_to_target": declared.target},
            }
    if isinstance(grading.checker, Exact):
        config["metric_list"][0] |= {
            "ignore_case": grading.checker.ignore_case,
            "regexes_to_ignore": list(grading.checker.ignore) or None,
        }
    else:
        checker = grading.checker
        golds = [question.answer for question in questions]
        for i, doc in enumerate(files["test"]):
            doc["_position"] = i
        config["process_results"] = lambda doc, results: {
            "exact_match": float(checker.right(results[0], golds[doc["_position"]]))
        }
    data = {split: _write(scratch / f"{split}.jsonl", rows) for split, rows in files.items()}
    config["dataset_kwargs"] = _dataset(data, scratch)
    return config


def _filters(task: Task) -> list[dict[str, Any]]:
    first = {"function": "take_first"}
    if not task.grading.extractions:
        return [{"name": "text", "filter": [{"function": "remove_whitespace"}, first]}]
    return [
        {
            "name": name,
            "filter": [
                {
                    "function": "regex",
                    "regex_pattern": extraction.pattern.pattern,
                    "group_select": extraction.pick,
                },
                first,
            ],
        }
        for name, extraction in task.grading.extractions.items()
    ]


def _run(
    config: str | dict[str, Any], folder: Path, limit: int, batch: int
) -> tuple[list[dict[str, Any]], float]:
    """Let the harness run; returns its samples, one a question and filter, and the seconds of generation."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Timed(HFLM):  # type: ignore[misc]
        seconds = 0.0

        def generate_until(self, *requests: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return super().generate_until(*requests, **options)
            finally:
                self.seconds += time.perf_counter() - began

    model = Timed(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch)
    # What `simple_evaluate` does, but for its report on the machine, which takes longer than a small evaluation.
    loaded = _task_manager().load([config])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEW_SHOT_SEED)
    results = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    [samples] = results["samples"].values()
    return list(samples), model.seconds


@functools.cache
def _task_manager() -> Any:
    """Loads tasks; without the index of the harness's own thousands of files, since none is asked for by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _verdict(sample: dict[str, Any]) -> Verdict:
    [extracted] = (
        sample["filtered_resps"] if isinstance(sample["filtered_resps"], list) else [sample["filtered_resps"]]
    )
    return Verdict(extracted, bool(sample["exact_match"]))


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _dataset(data: dict[str, str], scratch: Path) -> dict[str, Any]:
    return {"data_files": data, "cache_dir": str(scratch / "cache")}


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
