"""Tasks: questions with a checkable answer, in splits that never share a question.

A question's content decides its split, so no draw, seed or order can move it from one split to another. What is
guaranteed: the splits share no question and no rewording that the task knows of (of generated tasks: the same
operands in another order; of tasks made of files: see `near_duplicates`), and the test questions come out through
`Task.open_test` alone, which tells the seal first. Questions that were asked before can be left out by their ids, and
their rewordings go with them: so a second use of a task gets a test split that the first one has not seen. What is not
guaranteed: Python hides nothing from code that wants to reach around it.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from selfdev.errors import UserError
from selfdev.evaluation.tasks.grading import Grading
from selfdev.names import nearest


class Split(StrEnum):
    """What a question may be used for."""

    TRAINING = "training"
    DEVELOPMENT = "development"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its right answer.

    Attributes:
        group: the sub-task it belongs to, such as `add`.
        prompt: the question itself, as its template writes it.
        answer: what the checker compares with.
        context: the few-shot examples that stand before the prompt.
        solution: what a right continuation of the prompt looks like, the space before it included: the gold text
            of `exact` and `loglikelihood`; the answer where it is empty.
        where: file and line that it came from, for messages.
    """

    group: str
    prompt: str
    answer: str
    context: str = ""
    solution: str = ""
    where: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits: the hash of the content. The few-shot examples are no part of it."""
        return digest("\x1f".join((self.group, self.prompt, self.answer))).hex()

    @property
    def text(self) -> str:
        """What the model is given."""
        return self.context + self.prompt

    @property
    def gold(self) -> str:
        """What the model should write, to the letter."""
        return self.solution or self.answer

    @property
    def named(self) -> str:
        """How a message names it: file and line, or the prompt's end."""
        return self.where or f"question '{self.prompt[-60:]}'"


class Seal(Protocol):
    """What keeps a test split shut until the verdict; the archive implements it."""

    def opened(self, task_name: str) -> None:
        """Record that the task's test split is opened now, or raise if it must stay shut."""


class Task(ABC):
    """Questions in groups. The score of a model is the mean over the groups of its mean outcome there.

    Attributes:
        name: of the task.
        groups: its sub-tasks.
        grading: how an answer is written, read and judged.
    """

    name: str
    groups: tuple[str, ...]
    grading: Grading = Grading()

    @property
    def fingerprint(self) -> str:
        """Changes with what is asked and how it is judged; a built-in task changes with the version alone."""
        return self.name

    def development(
        self, count: int, order_seed: int, without: Collection[str] = frozenset()
    ) -> list[Question]:
        """Draw development questions, balanced over the groups.

        The same `order_seed` gives the same order, and a smaller count is a prefix of it: groups take turns,
        so that every prefix is balanced too. Another `order_seed` draws and orders anew.

        Args:
            count: how many.
            order_seed: of the order.
            without: ids of questions that are left out, with their rewordings.

        Raises:
            UserError: the split has fewer than `count` questions.
        """
        stream = random.Random(f"{self.name}/development/{order_seed}")
        return self._take(Split.DEVELOPMENT, count, stream, without)

    def open_test(self, count: int, seal: Seal, without: Collection[str] = frozenset()) -> list[Question]:
        """Hand out test questions, balanced over the groups, in one order for ever.

        Args:
            count: how many.
            seal: is told, or keeps the split shut.
            without: ids of questions that are left out, with their rewordings.

        Raises:
            UserError: the split has fewer than `count` questions.
            Exception: whatever the seal raises to stay shut; no question is then handed out.
        """
        # A request that cannot be met must not cost the one opening.
        self.check_count(Split.TEST, count, without)
        seal.opened(self.name)
        return self._take(Split.TEST, count, self._test_order(), without)

    def check_test(
        self,
        count: int,
        check: Callable[[Sequence[Question]], object],
        without: Collection[str] = frozenset(),
    ) -> None:
        """Show the test questions to a check that keeps nothing of them, so that what is wrong with one is told early.

        Args:
            count: how many will be asked.
            check: raises what is wrong.
            without: ids of questions that are left out, with their rewordings.
        """
        self.check_count(Split.TEST, count, without)
        check(self._take(Split.TEST, count, self._test_order(), without))

    @abstractmethod
    def training(self, groups: Sequence[str], stream: random.Random) -> Iterator[Question]:
        """Training questions without end, the group of each drawn from `groups`; for makers of models."""

    @abstractmethod
    def _pool(self, group: str, split: Split) -> Sequence[Question]:
        """All distinct questions of one group that the split offers, always in the same order."""

    @abstractmethod
    def _alike(self, question: Question) -> Hashable:
        """What a question of a pool and its rewordings have in common, and no other question has."""

    def families(self, questions: Sequence[Question]) -> list[Hashable]:
        """What each question and its rewordings have in common, and no other question has."""
        return [self._alike(question) for question in questions]

    def size(self, split: Split, without: Collection[str] = frozenset()) -> int:
        """How many questions the split has, the groups balanced; those of `without` and their rewordings left out."""
        return len(self.groups) * min(map(len, self._pools(split, without)))

    def check_count(self, split: Split, count: int, without: Collection[str] = frozenset()) -> None:
        """Raise UserError unless the split has `count` questions; shows none of them."""
        most = self.size(split, without)
        if not 0 < count <= most:
            left = " that were not asked before" if without else ""
            raise UserError(
                f"task '{self.name}': {count} {split} questions were asked for, and it has {most}{left}; "
                f"ask for 1 to {most}"
            )

    def _test_order(self) -> random.Random | None:
        """What shuffles the test split; None leaves it as it lies."""
        return random.Random(f"{self.name}/test")

    def _take(
        self, split: Split, count: int, stream: random.Random | None, without: Collection[str]
    ) -> list[Question]:
        self.check_count(split, count, without)
        ordered = self._pools(split, without)
        if stream is not None:
            for pool in ordered:
                stream.shuffle(pool)
        return [ordered[i % len(ordered)][i // len(ordered)] for i in range(count)]

    def _pools(self, split: Split, without: Collection[str]) -> list[list[Question]]:
        """The questions of every group, in the order of `groups`."""
        pools = [list(self._pool(group, split)) for group in self.groups]
        if not without:
            return pools
        everything = (
            q for each in (Split.DEVELOPMENT, Split.TEST) for g in self.groups for q in self._pool(g, each)
        )
        asked = {self._alike(question) for question in everything if question.id in without}
        return [[question for question in pool if self._alike(question) not in asked] for pool in pools]


def split_of(content: str) -> Split:
    """The split of a question, by the hash of its content: 60 % training, 15 % development, 25 % test."""
    share = share_of(content)
    if share < 0.60:
        return Split.TRAINING
    return Split.DEVELOPMENT if share < 0.75 else Split.TEST


def share_of(content: str) -> float:
    """A number in 0..1 that the content alone decides, spread evenly."""
    return int.from_bytes(digest(content)) / 2**64


def digest(text: str) -> bytes:
    """Eight bytes that identify a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def task_names() -> list[str]:
    """The names of the built-in tasks."""
    return sorted([*_generated(), *_declared()])


def load_task(name: str) -> Task:
    """The task of that name.

    Args:
        name: of a built-in task; of one that is made of files with the folder they lie in, such as
            `gsm8k:data/gsm8k` (without it they come from the Hub); or the path of a YAML file.

    Raises:
        UserError: there is none, or its files cannot be used.
    """
    if name in _generated():
        return _generated()[name]()
    if name.endswith((".yaml", ".yml")):
        return _load_declared(Path(name), None)
    base, colon, folder = name.partition(":")
    if base in _declared():
        return _load_declared(_declared()[base], Path(folder).expanduser() if colon else None)
    raise UserError(
        f"unknown task '{name}'; {nearest(base, task_names())}; a task of your own is a file that ends in .yaml"
    )


def _generated() -> dict[str, type[Task]]:
    from selfdev.evaluation.tasks.everyday import EVERYDAY
    from selfdev.evaluation.tasks.nano import NanoTask
    from selfdev.evaluation.tasks.nano2 import Nano2Task

    return {"nano": NanoTask, "nano2": Nano2Task, **EVERYDAY}


def _declared() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "declared").glob("*.yaml"))}


def _load_declared(path: Path, folder: Path | None) -> Task:
    from selfdev.evaluation.tasks.files import load_file_task

    return load_file_task(path, folder)
