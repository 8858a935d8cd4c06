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

import random
from typing import ClassVar

from selfdev.evaluation.tasks import Split
from selfdev.evaluation.tasks.generated import Draw, Drawn, GeneratedTask


def _add(stream: random.Random) -> Drawn:
    a, b = stream.randrange(100), stream.randrange(100)
    return Drawn(f"{a}+{b}=", str(a + b), f"{min(a, b)},{max(a, b)}")


def _sub(stream: random.Random) -> Drawn:
    b, a = sorted((stream.randrange(100), stream.randrange(100)))
    return Drawn(f"{a}-{b}=", str(a - b), f"{a},{b}")


def _sum(stream: random.Random) -> Drawn:
    digits = _digits(stream, 4)
    return Drawn(f"t{digits}=", str(sum(map(int, digits))), "".join(sorted(digits)))


def _max(stream: random.Random) -> Drawn:
    numbers = [stream.randrange(100) for _ in range(3)]
    return Drawn(f"m{','.join(map(str, numbers))}=", str(max(numbers)), ",".join(map(str, sorted(numbers))))


def _rev(stream: random.Random) -> Drawn:
    digits = _digits(stream, 5)
    return Drawn(f"r{digits}=", digits[::-1], min(digits, digits[::-1]))


def _sort(stream: random.Random) -> Drawn:
    digits = _digits(stream, 5)
    answer = "".join(sorted(digits))
    return Drawn(f"s{digits}=", answer, answer)


def _digits(stream: random.Random, count: int) -> str:
    return "".join(stream.choices("0123456789", k=count))


EXERCISES: dict[str, Draw] = {
    "add": _add,
    "sub": _sub,
    "sum": _sum,
    "max": _max,
    "rev": _rev,
    "sort": _sort,
}


class NanoTask(GeneratedTask):
    """Six groups of exercises on digits; 3,072 development and 6,144 test questions."""

    name = "nano"
    groups = tuple(EXERCISES)
    exercises = EXERCISES
    offered: ClassVar = {Split.DEVELOPMENT: 512, Split.TEST: 1024}
