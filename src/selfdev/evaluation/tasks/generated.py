"""Generated tasks: exercises that a function draws, as many as are wanted.

An exercise's operands decide its split, whatever their order or the words around them (`Drawn.key`), so the same
sum asked in two ways never stands in two splits.
"""

import functools
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

from selfdev.evaluation.tasks import Question, Split, Task, split_of


class Drawn(NamedTuple):
    """One drawn exercise: its question, its answer, and the key that decides its split."""

    prompt: str
    answer: str
    key: str


Draw = Callable[[random.Random], Drawn]


class GeneratedTask(Task):
    """Exercises drawn by functions, one a group.

    Attributes:
        exercises: group -> the function that draws one.
        offered: questions that a split offers in each group.
        few_shot: examples before each question, the groups taking turns; always the same, of the training split.
    """

    exercises: ClassVar[Mapping[str, Draw]]
    offered: ClassVar[Mapping[Split, int]]
    few_shot: ClassVar[int] = 0

    def training(self, groups: Sequence[str], stream: random.Random) -> Iterator[Question]:
        """Training questions without end, the group of each one drawn from `groups`."""
        while True:
            group = stream.choice(groups)
            drawn, split = self._draw(group, stream)
            if split is Split.TRAINING:
                yield self._question(group, drawn.prompt, drawn.answer)

    def _draw(self, group: str, stream: random.Random) -> tuple[Drawn, Split]:
        drawn = self.exercises[group](stream)
        return drawn, split_of(f"{self.name}/{group}/{drawn.key}")

    def _question(self, group: str, prompt: str, answer: str) -> Question:
        return Question(group, prompt, answer)

    def _pool(self, group: str, split: Split) -> Sequence[Question]:
        return tuple(_keys(type(self), group)[split])

    def _alike(self, question: Question) -> Hashable:
        kept = _keys(type(self), question.group).values()
        return question.group, next(keys[question] for keys in kept if question in keys)

    def _context(self) -> str:
        """The few-shot examples, as they stand before every question."""
        if not self.few_shot:
            return ""
        stream = random.Random(f"{self.name}/few-shot")
        groups = [self.groups[i % len(self.groups)] for i in range(self.few_shot)]
        shown = [next(self.training([group], stream)) for group in groups]
        return "".join(f"{question.prompt}{question.gold}\n\n" for question in shown)


_DRAWS = 100
"""Draws for each question offered, after which an exercise is taken to have no more."""


@functools.cache
def _keys(kind: type[GeneratedTask], group: str) -> dict[Split, dict[Question, str]]:
    """The first distinct questions of each split in a stream of the group's own, each with its `Drawn.key`."""
    task = kind()
    stream = random.Random(f"{task.name}/{group}")
    context = task._context()
    # Dicts keep the order of discovery.
    found: dict[Split, dict[Question, str]] = {split: {} for split in task.offered}
    missing = dict(task.offered)
    for _ in range(_DRAWS * max(task.offered.values())):
        drawn, split = task._draw(group, stream)
        if split in missing:
            question = task._question(group, drawn.prompt, drawn.answer)
            found[split][replace(question, context=context)] = drawn.key
            if len(found[split]) == missing[split]:
                del missing[split]
            if not missing:
                return found
    raise ValueError(
        f"{task.name}/{group} has too few questions for {', '.join(missing)}; widen its operands"
    )
