"""Tasks: questions with a checkable answer, in three splits that never share a question.

A question's content decides its split (`split_of`), so no draw, seed or order can move it from one split to
another. What is guaranteed: the splits share no question and no rewording that the task knows of (`12+34` and
`34+12` fall together), and the test questions come out through `Task.open_test` alone, which tells the seal
first. What is not: Python hides nothing from code that wants to reach around it.
"""

import difflib
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from selfdev.errors import UserError


class Split(StrEnum):
    """What a question may be used for."""

    TRAINING = "training"
    DEVELOPMENT = "development"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its only right answer."""

    group: str
    """The sub-task it belongs to, such as `add`."""
    prompt: str
    answer: str

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits: the hash of the content."""
        return _digest("\x1f".join((self.group, self.prompt, self.answer))).hex()


class Seal(Protocol):
    """What keeps a test split shut until the verdict; the archive implements it."""

    def opened(self, task_name: str) -> None:
        """Record that the task's test split is opened now, or raise if it must stay shut."""


class Task(ABC):
    """Questions in groups. The score of a model is the mean over the groups of its share of right answers."""

    name: str
    groups: tuple[str, ...]

    def development(self, count: int, order_seed: int) -> list[Question]:
        """Draw development questions, balanced over the groups.

        The same `order_seed` gives the same order, and a smaller count is a prefix of it: groups take turns,
        so that every prefix is balanced too. Another `order_seed` draws and orders anew.

        Raises:
            UserError: the split has fewer than `count` questions.
        """
        return self._take(Split.DEVELOPMENT, count, random.Random(f"{self.name}/development/{order_seed}"))

    def open_test(self, count: int, seal: Seal) -> list[Question]:
        """Hand out test questions, balanced over the groups, in one order for ever.

        Raises:
            UserError: the split has fewer than `count` questions.
            Exception: whatever the seal raises to stay shut; no question is then handed out.
        """
        self.check_count(Split.TEST, count)  # a request that cannot be met must not cost the one opening
        seal.opened(self.name)
        return self._take(Split.TEST, count, random.Random(f"{self.name}/test"))

    @abstractmethod
    def training(self, groups: Sequence[str], stream: random.Random) -> Iterator[Question]:
        """Training questions without end, the group of each drawn from `groups`; for makers of models."""

    @abstractmethod
    def _pool(self, group: str, split: Split) -> Sequence[Question]:
        """All distinct questions of one group that the split offers, always in the same order."""

    def check_count(self, split: Split, count: int) -> None:
        """Raise UserError unless the split has `count` questions; shows none of them."""
        most = len(self.groups) * min(len(self._pool(group, split)) for group in self.groups)
        if not 0 < count <= most:
            raise UserError(
                f"task '{self.name}': {count} {split} questions were asked for, and it has {most}; "
                f"ask for 1 to {most}"
            )

    def _take(self, split: Split, count: int, stream: random.Random) -> list[Question]:
        self.check_count(split, count)
        shuffled = []
        for group in self.groups:
            pool = list(self._pool(group, split))
            stream.shuffle(pool)
            shuffled.append(pool)
        return [shuffled[i % len(shuffled)][i // len(shuffled)] for i in range(count)]


def split_of(content: str) -> Split:
    """The split of a question, by the hash of its content: 60 % training, 15 % development, 25 % test."""
    share = int.from_bytes(_digest(content)) / 2**64
    if share < 0.60:
        return Split.TRAINING
    return Split.DEVELOPMENT if share < 0.75 else Split.TEST


def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    from selfdev.evaluation.tasks.nano import NanoTask

    known: dict[str, type[Task]] = {"nano": NanoTask}
    if name not in known:
        nearest = (difflib.get_close_matches(name, known, n=1, cutoff=0.0) or list(known))[0]
        raise UserError(f"unknown task '{name}'; the nearest known one is '{nearest}'")
    return known[name]()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
