"""Our tasks as configurations of lm-evaluation-harness, and their questions as files for it.

A task that the harness has itself gets the harness's own configuration, with another place of its data. Any other is
written down from the declaration's fields, under the harness's names.
"""

import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdev.errors import UserError
from selfdev.evaluation.tasks import Question, Task
from selfdev.evaluation.tasks.checkers import Exact
from selfdev.evaluation.tasks.files import FileTask


@dataclass(frozen=True)
class Stock:
    """A task of the harness's own that asks what one of ours asks.

    Attributes:
        file: its configuration, in the harness's folder of tasks.
        metric: which of its metrics decides.
        columns: that it reads of the data.
    """

    file: str
    metric: str
    columns: tuple[str, ...]


STOCK = {
    "gsm8k": Stock("gsm8k/gsm8k.yaml", "exact_match", ("question", "answer")),
    # All subjects have one prompt, one set of examples and one metric.
    "math": Stock("minerva_math/minerva_math_algebra.yaml", "math_verify", ("problem", "solution")),
}
"""By the names of our tasks."""


@dataclass(frozen=True)
class Posed:
    """A task as the harness is to run it.

    Attributes:
        config: the configuration, or its file.
        places: of our questions among the harness's.
        metric: that decides.
    """

    config: str | dict[str, Any]
    places: list[int]
    metric: str


def pose(task: Task, split: str, questions: Sequence[Question], scratch: Path) -> Posed:
    """Write down a task for the harness.

    Args:
        task: ours.
        split: `development` or `test`.
        questions: of that split.
        scratch: an empty folder, where the questions' files are put.

    Raises:
        UserError: what the harness's own task needs is not there.
    """
    stock = _stock_of(task, split)
    if stock is not None:
        assert isinstance(task, FileTask)
        return _stock(stock, task, questions, scratch)
    return Posed(_configured(task, questions, scratch), list(range(len(questions))), "exact_match")


def _stock_of(task: Task, split: str) -> Stock | None:
    """The harness's own task that asks these questions in this way."""
    if not isinstance(task, FileTask) or (task.name == "gsm8k" and split != "test"):
        return None
    return STOCK.get(task.name)


def _stock(stock: Stock, task: FileTask, questions: Sequence[Question], scratch: Path) -> Posed:
    """The harness's own task on local files."""
    rows = task.rows["test_data"]
    if task.name == "math":
        _check_math(questions)
        every = {row.where: row for row in (*task.rows["development_data"], *rows)}
        rows = [every[question.where] for question in questions]
    # For `gsm8k` all questions before ours are asked too: their place decides which examples are drawn.
    train = task.rows.get("few_shot_data", rows)
    data = {
        split: _write(
            scratch / f"{split}.jsonl",
            [{column: row.fields[column] for column in stock.columns} for row in each],
        )
        for split, each in (("train", train), ("test", rows))
    }
    place = {row.where: i for i, row in enumerate(rows)}
    own = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / stock.file  # type: ignore
    config = {
        "include": str(own),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": _dataset(data, scratch),
    }
    file = scratch / f"{task.name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return Posed(str(file), [place[question.where] for question in questions], stock.metric)


def _check_math(questions: Sequence[Question]) -> None:
    try:
        importlib.import_module("lm_eval.tasks.minerva_math.utils")
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"the harness's MATH cannot be loaded: {error}; it wants antlr4-python3-runtime==4.11.0 to the letter: "
            "pip install 'selfdev[eval]'"
        ) from error
    for question in questions:
        if "\\boxed" not in question.answer and "\\fbox" not in question.answer:
            raise UserError(
                f"{question.named}: the harness's MATH wants the answer in a \\boxed of the solution; add it, or "
                "leave lm-eval out"
            )


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


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _dataset(data: dict[str, str], scratch: Path) -> dict[str, Any]:
    return {"data_files": data, "cache_dir": str(scratch / "cache")}
