"""Tasks that are made of data files: a declaration, its rows, and the splits they fall into.

How the splits are made. Rows that are near-duplicates of each other form families (`near_duplicates`), and a family
lies in one split. A file that is given as the test data stays whole but for questions that a few-shot example shows.
The development questions are those of their file whose family meets neither the test file nor an example. Where both
come from one file, the hash of a family's content decides. What is left over trains.
"""

import functools
import os
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from selfdev.errors import UserError
from selfdev.evaluation.tasks import Question, Split, Task, digest, share_of
from selfdev.evaluation.tasks.declaration import TEMPLATES, Declaration, TaskFile
from selfdev.evaluation.tasks.grading import Way
from selfdev.evaluation.tasks.near_duplicates import families
from selfdev.evaluation.tasks.rows import Row, read_rows

FEW_SHOT_SEED = 1234
"""Of the draws with `few_shot_draw: each`: the harness's own default."""


class FileTask(Task):
    """A task that a YAML file declares.

    Attributes:
        declaration: what the file says.
        rows: the data rows of each role that has a file, in the file's order.
        dropped: how many questions each split does without, since they are few-shot examples or near-duplicates of
            one or, of development, of a test question.
    """

    def __init__(self, file: TaskFile, rows: dict[str, list[Row]]):
        self.declaration = file.declaration
        self.rows = rows
        self.name = self.declaration.name
        self.grading = self.declaration.grading()
        self._render = _Renderer(file, rows)
        self._splits, self.dropped, self._families = _deal(self.declaration, rows, self._render)
        for split in (Split.DEVELOPMENT, Split.TEST):
            if not self._splits[split]:
                raise UserError(_empty(file, split, self.declaration, self.dropped[split]))
        self.groups = tuple(dict.fromkeys(q.group for q in self._splits[Split.TEST]))
        if alone := {q.group for q in self._splits[Split.DEVELOPMENT]} ^ set(self.groups):
            raise UserError(
                f"{file.where('group')}: the group '{min(alone)}' has questions in one of development and test alone; "
                "give each group more questions, or leave `group` out"
            )

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the declaration or with any question."""
        everything = [question for split in Split for question in self._splits[split]]
        return digest(
            "\x1f".join([self.declaration.model_dump_json(), *(q.context + q.id for q in everything)])
        ).hex()

    def training(self, groups: Sequence[str], stream: random.Random) -> Iterator[Question]:
        """Training questions without end, the group of each one drawn from `groups`.

        Raises:
            UserError: a group has no training question.
        """
        for group in groups:
            if not self._pool(group, Split.TRAINING):
                raise UserError(f"task '{self.name}': the group '{group}' has no training question")
        while True:
            yield stream.choice(self._pool(stream.choice(groups), Split.TRAINING))

    def examples(self) -> list[Row]:
        """The rows of the few-shot examples, if all questions have the same ones."""
        return list(self._render.shown) if self.declaration.few_shot_draw != "each" else []

    def _pool(self, group: str, split: Split) -> Sequence[Question]:
        return [question for question in self._splits[split] if question.group == group]

    def _alike(self, question: Question) -> Hashable:
        return self._families[question.id]

    def _test_order(self) -> random.Random | None:
        return None if self.declaration.test_order == "file" else super()._test_order()


def load_file_task(path: Path, folder: Path | None = None) -> FileTask:
    """Read a declared task, its data files included.

    Args:
        path: of the YAML file.
        folder: where its data files lie; beside the YAML file by default, or on the Hub if it names a data set there.

    Raises:
        UserError: see `TaskFile`, `read_rows` and `FileTask`.
    """
    declaration = TaskFile(path).declaration
    if folder is None and declaration.hub is not None:
        from selfdev.evaluation.tasks.hub import fetch

        files = fetch(declaration.hub, declaration.files())
    else:
        base = path.parent if folder is None else folder
        if not base.is_dir():
            raise UserError(f"task '{declaration.name}': there is no folder '{base}' for its data files")
        files = {role: (base / name,) for role, name in declaration.files().items()}
    everything = sorted({file for each in files.values() for file in each} | {path})
    stamps = tuple((status.st_mtime_ns, status.st_size) for status in map(_stat, everything))
    return _built(path, tuple(files.items()), stamps)


@functools.lru_cache(maxsize=8)  # a config's check and its run ask for the same task; one takes seconds
def _built(
    path: Path, files: tuple[tuple[str, tuple[Path, ...]], ...], stamps: tuple[tuple[int, int], ...]
) -> FileTask:
    rows = {each: [row for file in each for row in read_rows(file)] for each in {each for _, each in files}}
    return FileTask(TaskFile(path), {role: rows[each] for role, each in files})


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; the task file names it") from None


class _Renderer:
    """Makes questions of rows, and checks each row on the way."""

    def __init__(self, file: TaskFile, rows: dict[str, list[Row]]):
        self.file = file
        self.declaration = file.declaration
        self._used = [field for field in TEMPLATES if getattr(self.declaration, field) is not None]
        self._columns = {field: self.declaration.columns(field) for field in self._used}
        for each in rows.values():
            self._check_columns(each)
        self.shown: list[Row] = []
        self._questions: dict[str, Question] = {}  # an example is rendered once, however often it is shown
        self._checker = self.declaration.grading().checker
        self._needs_gold = self.declaration.scoring is not Way.LOGLIKELIHOOD

    def question(self, row: Row) -> Question:
        """A row as a question, without its few-shot examples."""
        if row.where not in self._questions:
            self._questions[row.where] = self._question(row)
        return self._questions[row.where]

    def _question(self, row: Row) -> Question:
        declared = self.declaration
        texts = {field: self._rendered(field, row) for field in self._used}
        answer = texts.get("answer", texts["target"])
        if not texts["target"]:
            raise UserError(f"{row.where}: the target is empty, so there is nothing to learn or score")
        if self._needs_gold:
            try:
                self._checker.check_gold(answer)
            except ValueError as error:
                raise UserError(
                    f"{row.where}: the checker '{declared.checker.name}' cannot use the answer "
                    f"{answer[-80:]!r}: {error}"
                ) from None
        return Question(
            texts.get("group", declared.name),
            texts["prompt"],
            answer,
            solution=declared.delimiter + texts["target"],
            where=row.where,
        )

    def context(self, rows: Sequence[Row]) -> str:
        """The few-shot examples as they stand before a prompt."""
        questions = map(self.question, rows)
        return "".join(
            question.prompt + question.solution + self.declaration.separator for question in questions
        )

    def _rendered(self, field: str, row: Row) -> str:
        missing = sorted(column for column in self._columns[field] if row.fields.get(column) is None)
        if missing:
            raise UserError(
                f"{row.where}: the field '{missing[0]}' is missing, and the template `{field}` needs it"
            )
        try:
            return self.declaration.render(field, dict(row.fields))
        except ValueError as error:
            raise UserError(f"{row.where}: {error}") from None

    def _check_columns(self, rows: Sequence[Row]) -> None:
        there = dict.fromkeys(column for row in rows for column in row.fields)
        for field in self._used:
            for column in sorted(self._columns[field] - set(there)):
                raise UserError(
                    f"{self.file.where(field)}: the template `{field}` names the column '{column}', which "
                    f"{rows[0].file} does not have; its columns are {', '.join(there) or 'none'}"
                )


def _deal(
    declared: Declaration, rows: dict[str, list[Row]], render: _Renderer
) -> tuple[dict[Split, list[Question]], dict[Split, int], dict[str, int]]:
    """Deal the rows out to the splits; also how many each split lost to near-duplicates, and the family of each id."""
    files = list({id(each): each for each in rows.values()}.values())
    inline = _inline_rows(declared, render.file)
    every = [row for file in files for row in file]
    questions = {row.where: render.question(row) for row in every}
    _refuse_repetition(list(questions.values()))
    family = dict(
        zip(
            [row.where for row in (*every, *inline)],
            families(
                [questions[row.where].prompt for row in every] + [render.context([row]) for row in inline],
                mask_numbers=declared.near_duplicates == "masked",
            ),
            strict=True,
        )
    )
    development, test = rows["development_data"], rows["test_data"]
    one_file = development is test
    in_test = set() if one_file else {family[row.where] for row in test}
    contexts = _FewShot(declared, rows, inline, render, family, in_test)
    shown = {family[row.where] for row in render.shown}

    share = {  # of a family, by its first member's content
        f: share_of(questions[every[f].where].id) for f in set(family.values()) if f < len(every)
    }

    def meant_for(source: list[Row], its_family: int) -> Split:
        if source is not test:
            return Split.DEVELOPMENT if source is development else Split.TRAINING
        to_development = one_file and share[its_family] < declared.development_share
        return Split.DEVELOPMENT if to_development else Split.TEST

    splits: dict[Split, list[Question]] = {split: [] for split in Split}
    dropped = dict.fromkeys(Split, 0)
    for source in files:
        for i, row in enumerate(source):
            question, its_family = questions[row.where], family[row.where]
            split = meant_for(source, its_family)
            tells = its_family in shown or (split is Split.DEVELOPMENT and its_family in in_test)
            if split is not Split.TRAINING and tells:
                dropped[split] += 1
                split = Split.TRAINING
            if split is not Split.TRAINING:
                splits[split].append(replace(question, context=contexts.before(i, split)))
            elif its_family not in in_test:
                splits[split].append(question)
    return splits, dropped, {questions[row.where].id: family[row.where] for row in every}


class _FewShot:
    """Which examples stand before which question."""

    def __init__(
        self,
        declared: Declaration,
        rows: dict[str, list[Row]],
        inline: list[Row],
        render: _Renderer,
        family: dict[str, int],
        in_test: set[int],
    ):
        self._count = len(inline) if isinstance(declared.few_shot, tuple) else declared.few_shot
        self._render = render
        pool = inline or rows.get("few_shot_data", [])
        if self._count > len(pool):
            raise UserError(
                f"{render.file.where('few_shot')}: {self._count} few-shot examples, and there are {len(pool)} rows to "
                "take them from"
            )
        self._pools: dict[Split, list[Row]] = {}
        if declared.few_shot_draw == "each" and self._count:
            test = rows["test_data"]
            chosen = sorted(
                {i for n in range(len(test)) for i in _draws(len(pool), self._count, len(test))[n]}
            )
            render.shown = [pool[i] for i in chosen]
            # A development question may be shown what test questions are shown, and nothing else.
            self._pools = {Split.TEST: pool, Split.DEVELOPMENT: render.shown}
            self._lengths = {Split.TEST: len(test), Split.DEVELOPMENT: len(rows["development_data"])}
        elif declared.few_shot_draw == "first" or inline:
            render.shown = pool[: self._count]
        else:
            render.shown = _spread(pool, self._count, family, in_test, render)
        self._fixed = render.context(render.shown) if not self._pools else ""

    def before(self, i: int, split: Split) -> str:
        """The examples before the question on row i of its file."""
        if not self._pools:
            return self._fixed
        pool = self._pools[split]
        drawn = _draws(len(pool), self._count, self._lengths[split])[i]
        return self._render.context([pool[j] for j in drawn])


@functools.lru_cache(maxsize=4)
def _draws(pool: int, count: int, questions: int) -> list[list[int]]:
    """What lm-evaluation-harness draws for the first, second, ... question of a split: one stream, in their order."""
    stream = random.Random(FEW_SHOT_SEED)
    return [stream.sample(range(pool), count) for _ in range(questions)]


def _spread(
    pool: Sequence[Row], count: int, family: dict[str, int], in_test: set[int], render: _Renderer
) -> list[Row]:
    """One row each of the `count` families that come first in the order of their content's hash."""
    chosen: dict[int, Row] = {}
    for row in sorted(pool, key=lambda row: share_of(render.question(row).id)):
        if len(chosen) < count and family[row.where] not in in_test:
            chosen.setdefault(family[row.where], row)
    if len(chosen) < count:
        raise UserError(
            f"{render.file.where('few_shot')}: {count} few-shot examples, and only {len(chosen)} rows are no "
            "near-duplicates of each other or of a test question"
        )
    return list(chosen.values())


def _inline_rows(declared: Declaration, file: TaskFile) -> list[Row]:
    if isinstance(declared.few_shot, int):
        return []
    line = int(file.where("few_shot").rpartition(":")[2])
    # Their own lines in the YAML are not kept; counted on, so that each has a name of its own.
    return [Row(file.path, line + i, fields) for i, fields in enumerate(declared.few_shot)]


def _refuse_repetition(questions: Sequence[Question]) -> None:
    seen: dict[str, Question] = {}
    for question in questions:
        first = seen.setdefault(question.prompt, question)
        if first is not question:
            what = "same question with the same answer" if first.id == question.id else "same question"
            raise UserError(f"{question.where}: the {what} stands at {first.where}; keep one of the two")


def _empty(file: TaskFile, split: Split, declared: Declaration, dropped: int) -> str:
    role = "data" if declared.data else f"{split.value}_data"
    if dropped:
        why = f"all {dropped} of its questions are near-duplicates of few-shot examples or of test questions"
    else:
        why = "the file has too few families of near-duplicates to share out"
    way = "give it more questions"
    if declared.near_duplicates == "masked":
        way += ", or set `near_duplicates: text` if questions that differ in their numbers alone are different ones"
    return f"{file.where(role)}: the {split.value} split is empty: {why}; {way}"
