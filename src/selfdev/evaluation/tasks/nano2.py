"""The task `nano2`: six more exercises on digits, none of which the task `nano` asks.

| group | prompt       | answer  | what                                              |
| ----- | ------------ | ------- | ------------------------------------------------- |
| gap   | `g52718=`    | `3567`  | how far each of five digits is from the next one  |
| low   | `l27,8,45=`  | `8`     | the smallest of three numbers below 100           |
| tri   | `w4371=`     | `13113` | three times a number below 10,000                 |
| tot   | `p52718=`    | `23`    | the sum of five digits                            |
| rot   | `o52718=`    | `27185` | five digits, the first one moved to the end       |
| down  | `v52718=`    | `87521` | five digits in falling order                      |

They are what the second family of the zoo, `nano2`, is trained and measured on: a run on `nano` sees neither these
questions nor these skills, so its algorithms can be carried over to both.
"""

import itertools
import random
from typing import ClassVar

from selfdev.evaluation.tasks import Split
from selfdev.evaluation.tasks.generated import Draw, Drawn, GeneratedTask


def _gap(stream: random.Random) -> Drawn:
    digits = _five_digits(stream)
    gaps = (abs(int(one) - int(next_one)) for one, next_one in itertools.pairwise(digits))
    return Drawn(f"g{digits}=", "".join(map(str, gaps)), min(digits, digits[::-1]))


def _low(stream: random.Random) -> Drawn:
    numbers = [stream.randrange(100) for _ in range(3)]
    return Drawn(f"l{','.join(map(str, numbers))}=", str(min(numbers)), ",".join(map(str, sorted(numbers))))


def _tri(stream: random.Random) -> Drawn:
    number = stream.randrange(10_000)
    return Drawn(f"w{number}=", str(3 * number), str(number))


def _tot(stream: random.Random) -> Drawn:
    digits = _five_digits(stream)
    return Drawn(f"p{digits}=", str(sum(map(int, digits))), "".join(sorted(digits)))


def _rot(stream: random.Random) -> Drawn:
    digits = _five_digits(stream)
    return Drawn(f"o{digits}=", digits[1:] + digits[0], digits)


def _down(stream: random.Random) -> Drawn:
    digits = _five_digits(stream)
    answer = "".join(sorted(digits, reverse=True))
    return Drawn(f"v{digits}=", answer, answer)


def _five_digits(stream: random.Random) -> str:
    return "".join(stream.choices("0123456789", k=5))


EXERCISES: dict[str, Draw] = {
    "gap": _gap,
    "low": _low,
    "tri": _tri,
    "tot": _tot,
    "rot": _rot,
    "down": _down,
}


class Nano2Task(GeneratedTask):
    """Six groups of exercises on digits; 3,072 development and 6,144 test questions."""

    name = "nano2"
    groups = tuple(EXERCISES)
    exercises = EXERCISES
    offered: ClassVar = {Split.DEVELOPMENT: 512, Split.TEST: 1024}
