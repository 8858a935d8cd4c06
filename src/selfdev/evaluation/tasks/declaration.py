"""A task's declaration: the YAML file that says what its questions are and how they are graded.

Every field is described in `docs/tasks.md`.
"""

import functools
import re
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
import jinja2.sandbox
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from selfdev.errors import UserError
from selfdev.evaluation.tasks.checkers import CHECKERS, Checker, Exact
from selfdev.evaluation.tasks.grading import Extraction, Grading, Way
from selfdev.names import fields_at, nearest
from selfdev.settings import Section
from selfdev.yaml_files import load_yaml

ROLES = ("few_shot_data", "development_data", "test_data")
"""The fields that name data files, in the order in which a shared file is dealt out."""
TEMPLATES = ("prompt", "target", "answer", "group")
"""The fields that are templates over a row's columns."""

# As lm-evaluation-harness reads templates: an unknown name is an error, and a last newline stays.
_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


class ExtractionSettings(Section):
    """Where in a text the answer stands."""

    pattern: str = Field(description="A regular expression; its first group that is not empty counts.")
    pick: Literal["first", "last"] = Field("first", description="Which of its matches.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _regular(pattern)


class CheckerSettings(Section):
    """Which checker, and what it overlooks."""

    name: str = Field(description="exact, numeric or math-verify.")
    ignore: tuple[str, ...] = Field((), description="Of exact: patterns removed from both sides, in order.")
    ignore_case: bool = Field(False, description="Of exact: compare in lower case.")

    @model_validator(mode="after")
    def _known(self) -> "CheckerSettings":
        if self.name not in CHECKERS:
            raise ValueError(f"no checker '{self.name}'; there are {', '.join(CHECKERS)}")
        if self.name != "exact" and (self.ignore or self.ignore_case):
            raise ValueError(
                f"`ignore` and `ignore_case` are of the checker 'exact' and not of '{self.name}'"
            )
        for pattern in self.ignore:
            _regular(pattern)
        return self


class Hub(Section):
    """A data set on the Hugging Face Hub, used where no folder is given."""

    dataset: str
    few_shot_data: str | None = Field(None, description="What the names of its parquet files begin with.")
    development_data: str
    test_data: str


class Declaration(Section):
    """What a task file says."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Of the task.")
    data: str | None = Field(None, description="One file of JSON lines for all splits, by content hash.")
    few_shot_data: str | None = Field(None, description="File that the few-shot examples come from.")
    development_data: str | None = Field(None, description="File of the development questions.")
    test_data: str | None = Field(None, description="File of the test questions.")
    hub: Hub | None = None
    prompt: str = Field(description="Template of the question.")
    target: str = Field("{{answer}}", description="Template of a right continuation, as examples show it.")
    answer: str | None = Field(None, description="Template of the gold answer; the target by default.")
    group: str | None = Field(None, description="Template of the sub-task; one group by default.")
    delimiter: str = Field(" ", description="Between prompt and target.")
    separator: str = Field("\n\n", description="After each few-shot example.")
    few_shot: int | tuple[dict[str, Any], ...] = Field(
        0, description="How many examples, or the rows themselves."
    )
    few_shot_draw: Literal["hash", "first", "each"] = Field(
        "hash", description="Which rows are the examples."
    )
    scoring: Way = Field(Way.GENERATE, description="exact, generate or loglikelihood.")
    stop: tuple[str, ...] = Field((), description="Strings that end an answer, beside the end token.")
    max_new_tokens: int = Field(256, ge=1, description="Where an answer that does not end is cut, in tokens.")
    extract: dict[str, ExtractionSettings] = Field({}, description="By name; the first one decides.")
    checker: CheckerSettings = CheckerSettings(name="exact")
    development_share: float = Field(
        0.4, gt=0, lt=1, description="Of a file that development and test share."
    )
    near_duplicates: Literal["masked", "text"] = Field(
        "masked", description="Whether wordy questions that differ in numbers alone are one family."
    )
    test_order: Literal["shuffled", "file"] = Field("shuffled", description="Order of the test questions.")

    @field_validator("extract", mode="before")
    @classmethod
    def _short_extract(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"answer": {"pattern": value}}
        return {"answer": value} if isinstance(value, dict) and "pattern" in value else value

    @field_validator("checker", mode="before")
    @classmethod
    def _short_checker(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _short_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stops_something(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty string would stop every answer at once; leave it out")
        return stop

    @field_validator(*TEMPLATES)
    @classmethod
    def _parses(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                _ENVIRONMENT.parse(template)
            except jinja2.TemplateError as error:
                raise ValueError(f"no template: {error}; a column reads {{{{name}}}}") from None
        return template

    @model_validator(mode="after")
    def _possible(self) -> "Declaration":
        if self.data is None and (self.development_data is None or self.test_data is None):
            raise ValueError(
                "it names no questions: give `data` (one file), or `development_data` and `test_data`"
            )
        if self.data is not None and any(getattr(self, role) for role in ROLES):
            raise ValueError("`data` is the file of all splits; leave it out where each has its own")
        if isinstance(self.few_shot, int):
            if self.few_shot < 0:
                raise ValueError(f"few_shot: {self.few_shot} examples; 0 or more")
            if self.few_shot and self.data is None and self.few_shot_data is None:
                raise ValueError("few_shot: no file to take the examples from; give `few_shot_data`")
        try:
            self.grading()
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.scoring is Way.EXACT and self.answer not in (None, self.target):
            raise ValueError(
                "scoring 'exact' compares the whole target; leave `answer` out or use 'generate'"
            )
        return self

    def files(self) -> dict[str, str]:
        """The data file of each role that has one, as the declaration names it."""
        named = {role: self.data or getattr(self, role) for role in ROLES}
        return {role: name for role, name in named.items() if name is not None}

    def grading(self) -> Grading:
        """How answers are written, read and judged."""
        extractions = {
            name: Extraction(re.compile(each.pattern), 0 if each.pick == "first" else -1)
            for name, each in self.extract.items()
        }
        return Grading(self.scoring, self.stop, self.max_new_tokens, extractions, self._checker())

    def _checker(self) -> Checker:
        if self.checker.name == "exact":
            return Exact(self.checker.ignore, self.checker.ignore_case)
        return CHECKERS[self.checker.name]()

    def columns(self, field: str) -> set[str]:
        """The columns that a template names."""
        return set(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(getattr(self, field) or "")))

    def render(self, field: str, row: dict[str, Any]) -> str:
        """A template filled with a row.

        Raises:
            ValueError: the template does not fit the row.
        """
        try:
            return str(_compiled(getattr(self, field)).render(**row))
        except (jinja2.TemplateError, TypeError, ArithmeticError) as error:
            raise ValueError(f"the template `{field}` fails: {error}") from None


class TaskFile:
    """A declaration and the text it came from, which knows on which line each field stands.

    Args:
        path: of the YAML file.

    Raises:
        UserError: it cannot be read, lacks a field, or says something impossible.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
            data = load_yaml(text)
            self._node = yaml.compose(text)
        except OSError as error:
            here = "" if path.is_absolute() else f" (in {Path.cwd()})"
            raise UserError(f"{path}: {error.strerror}{here}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: it is no text in UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: no YAML: {getattr(error, 'problem', error)}") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}:1: it holds no fields; a task needs at least name, data and prompt")
        try:
            self.declaration = Declaration.model_validate(data)
        except ValidationError as error:
            raise UserError("\n".join(self._explain(problem) for problem in error.errors())) from None

    def where(self, field: str = "") -> str:
        """File and line of a top-level field; the first line if it is not there."""
        if isinstance(self._node, yaml.MappingNode):
            for key, _ in self._node.value:
                if key.value == field:
                    return f"{self.path}:{key.start_mark.line + 1}"
        return f"{self.path}:1"

    def _explain(self, problem: Any) -> str:
        path = [str(part) for part in problem["loc"]]
        where = self.where(path[0] if path else "")
        match problem["type"]:
            case "missing":
                return f"{where}: the field '{'.'.join(path)}' is missing"
            case "extra_forbidden":
                known = fields_at(Declaration, path[:-1])
                return f"{where}: unknown field '{'.'.join(path)}'; {nearest(path[-1], known)}"
            case "value_error":
                reason = str(problem["ctx"]["error"])
                # What concerns several fields begins with the one to look at.
                return f"{self.where(reason.partition(':')[0]) if not path else where}: {reason}"
        return f"{where}: {'.'.join(path)}: {problem['msg']}, not {problem['input']!r}"


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern
