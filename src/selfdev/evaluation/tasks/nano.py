"""The task `nano`: six short exercises on digits that a model of half a million parameters can learn.

| group | prompt       | answer | what                                   |
| ----- | ------------ | ------ | -------------------------------------- |
| add   | `27+45=`     | `72`   | the sum of two numbers below 100       |
| sub   | `45-27=`     | `18`   | the difference, the larger first       |
| sum   | `t5271=`     | `15`   | the sum of four digits                 |
| max   | `m27,8,45=`  | `45`   | the largest of three numbers below 100 |
| rev   | `r52718=`    | `81725`| five digits backwards                  |
| sort  | `s52718=`    | `12578`| five digits in rising order            |

A language model answers by writing the answer and then its end token.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence

from selfdev.evaluation.tasks import Question, Split, Task, split_of

POOL = {Split.DEVELOPMENT: 512, Split.TEST: 1024}
"""Questions that a split offers in each group."""

Drawn = tuple[str, str, str]
"""Prompt, answer, and the key that decides the split, the same for the same operands in any order."""


def _add(stream: random.Random) -> Drawn:
    a, b = stream.randrange(100), stream.randrange(100)
    return f"{a}+{b}=", str(a + b), f"{min(a, b)},{max(a, b)}"


def _sub(stream: random.Random) -> Drawn:
    b, a = sorted((stream.randrange(100), stream.randrange(100)))
    return f"{a}-{b}=", str(a - b), f"{a},{b}"


def _sum(stream: random.Random) -> Drawn:
    digits = _digits(stream, 4)
    return f"t{digits}=", str(sum(map(int, digits))), "".join(sorted(digits))


def _max(stream: random.Random) -> Drawn:
    numbers = [stream.randrange(100) for _ in range(3)]
    return f"m{','.join(map(str, numbers))}=", str(max(numbers)), ",".join(map(str, sorted(numbers)))


def _rev(stream: random.Random) -> Drawn:
    digits = _digits(stream, 5)
    return f"r{digits}=", digits[::-1], min(digits, digits[::-1])


def _sort(stream: random.Random) -> Drawn:
    digits = _digits(stream, 5)
    answer = "".join(sorted(digits))
    return f"s{digits}=", answer, answer


def _digits(stream: random.Random, count: int) -> str:
    return "".join(stream.choices("0123456789", k=count))


EXERCISES: dict[str, Callable[[random.Random], Drawn]] = {
    "add": _add,
    "sub": _sub,
    "sum": _sum,
    "max": _max,
    "rev": _rev,
    "sort": _sort,
}


class NanoTask(Task):
    """Six groups of exercises on digits; 3,072 development and 6,144 test questions."""

    name = "nano"
    groups = tuple(EXERCISES)

    def training(self, groups: Sequence[str], stream: random.Random) -> Iterator[Question]:
        """Training questions without end, the group of each one drawn from `groups`."""
        while True:
            group = stream.choice(groups)
            question, split = _draw(group, stream)
            if split is Split.TRAINING:
                yield question

    def _pool(self, group: str, split: Split) -> Sequence[Question]:
        return _pool(group, split)


def _draw(group: str, stream: random.Random) -> tuple[Question, Split]:
    prompt, answer, key = EXERCISES[group](stream)
    return Question(group, prompt, answer), split_of(f"nano/{group}/{key}")


@functools.cache
def _pool(group: str, split: Split) -> tuple[Question, ...]:
    """The first distinct questions of the split in a stream of the group's own."""
    stream = random.Random(f"nano/{group}")
    found: dict[Question, None] = {}  # a dict keeps the order of discovery, a set would not
    while len(found) < POOL[split]:
        question, its_split = _draw(group, stream)
        if its_split is split:
            found[question] = None
    return tuple(found)
