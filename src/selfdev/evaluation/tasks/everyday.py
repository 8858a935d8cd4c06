"""Everyday tasks: templated questions in plain English that a model of 135 M parameters can learn.

| task            | groups                         | a question, and its answer                                  |
| --------------- | ------------------------------ | ----------------------------------------------------------- |
| `word_problems` | buy, share, left, together     | `Mia has 9 pens and gives 4 away. How many pens are left?` 5 |
| `units`         | length, weight, time, volume   | `How many grams are 7 kilograms?` 7000                      |
| `dates`         | weekday, month, between, later | `Which weekday is 10 days after Monday?` Thursday           |
| `strings`       | reverse, last, count, join     | `Write the word 'tabo' backwards.` obat                     |

Each question follows four examples of the training split. The answer is the text up to the end of the line.
"""

import calendar
import datetime
import random
from collections.abc import Mapping
from typing import ClassVar

from selfdev.evaluation.tasks import Question, Split
from selfdev.evaluation.tasks.generated import Draw, Drawn, GeneratedTask
from selfdev.evaluation.tasks.grading import Grading, Way

NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Sam", "Lea", "Jon")
THINGS = ("pens", "apples", "books", "stamps", "cards", "shells", "cups", "coins", "seeds", "stones")
DAYS = tuple(calendar.day_name)
MONTHS = tuple(calendar.month_name)[1:]


class EverydayTask(GeneratedTask):
    """Four groups of questions; 384 development and 640 test questions."""

    grading = Grading(Way.GENERATE, stop=("\n",), max_new_tokens=16)
    offered: ClassVar = {Split.DEVELOPMENT: 96, Split.TEST: 160}
    few_shot = 4

    def _question(self, group: str, prompt: str, answer: str) -> Question:
        return Question(group, f"Question: {prompt}\nAnswer:", answer, solution=f" {answer}")


# --- word problems


def _buy(stream: random.Random) -> Drawn:
    count, price, name, thing = stream.randrange(2, 100), stream.randrange(2, 10), *_who(stream)
    asked = stream.choice(
        (
            f"{name} buys {count} {thing} for {price} dollars each. How many dollars does {name} pay?",
            f"One of the {thing} costs {price} dollars. How many dollars does {name} pay for {count} {thing}?",
        )
    )
    return Drawn(asked, str(count * price), _key(count, price))


def _share(stream: random.Random) -> Drawn:
    each, people, name, thing = stream.randrange(2, 100), stream.randrange(2, 10), *_who(stream)
    asked = stream.choice(
        (
            f"{name} shares {each * people} {thing} equally among {people} friends. How many does each friend get?",
            f"{name} packs {each * people} {thing} into {people} boxes, the same number into each. "
            "How many are in one box?",
        )
    )
    return Drawn(asked, str(each), _key(each, people))


def _left(stream: random.Random) -> Drawn:
    given, left, (name, thing) = stream.randrange(1, 50), stream.randrange(1, 50), _who(stream)
    asked = f"{name} has {given + left} {thing} and gives {given} away. How many {thing} are left?"
    return Drawn(asked, str(left), _key(given, left))


def _together(stream: random.Random) -> Drawn:
    one, two, (name, thing) = stream.randrange(2, 60), stream.randrange(2, 60), _who(stream)
    other = stream.choice([each for each in NAMES if each != name])
    asked = f"{name} has {one} {thing}. {other} has {two} {thing}. How many {thing} do they have together?"
    return Drawn(asked, str(one + two), _key(one, two))


def _who(stream: random.Random) -> tuple[str, str]:
    return stream.choice(NAMES), stream.choice(THINGS)


def _key(*operands: int) -> str:
    return ",".join(map(str, sorted(operands)))


class WordProblems(EverydayTask):
    """Small sums in words."""

    name = "word_problems"
    exercises: ClassVar[Mapping[str, Draw]] = {
        "buy": _buy,
        "share": _share,
        "left": _left,
        "together": _together,
    }
    groups = tuple(exercises)


# --- units


def _conversion(*units: tuple[str, str, int]) -> Draw:
    """Draws `how many SMALL are COUNT LARGE`; each unit is (large, small, how many small ones make a large one)."""

    def draw(stream: random.Random) -> Drawn:
        (large, small, factor), count = stream.choice(units), stream.randrange(2, 600)
        asked = stream.choice(
            (f"How many {small} are {count} {large}?", f"Convert {count} {large} to {small}.")
        )
        return Drawn(asked, str(count * factor), f"{large},{small},{count}")

    return draw


class Units(EverydayTask):
    """Conversions from a larger unit to a smaller one."""

    name = "units"
    exercises: ClassVar[Mapping[str, Draw]] = {
        "length": _conversion(
            ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("yards", "feet", 3)
        ),
        "weight": _conversion(
            ("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("pounds", "ounces", 16)
        ),
        "time": _conversion(("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7)),
        "volume": _conversion(
            ("litres", "millilitres", 1000), ("gallons", "quarts", 4), ("cups", "spoons", 16)
        ),
    }
    groups = tuple(exercises)


# --- dates


def _weekday(stream: random.Random) -> Drawn:
    day, later = stream.randrange(7), stream.randrange(1, 200)
    return Drawn(
        f"Which weekday is {later} days after {DAYS[day]}?", DAYS[(day + later) % 7], f"{day},{later}"
    )


def _month(stream: random.Random) -> Drawn:
    month, later = stream.randrange(12), stream.randrange(1, 100)
    asked = f"Which month is {later} months after {MONTHS[month]}?"
    return Drawn(asked, MONTHS[(month + later) % 12], f"{month},{later}")


def _between(stream: random.Random) -> Drawn:
    month = stream.randrange(12)
    first, last = sorted(stream.sample(range(1, 29), 2))
    asked = f"How many days is it from {MONTHS[month]} {first} to {MONTHS[month]} {last}?"
    return Drawn(asked, str(last - first), f"{month},{first},{last}")


def _later(stream: random.Random) -> Drawn:
    start = datetime.date(2001, 1, 1) + datetime.timedelta(days=stream.randrange(9000))
    days = stream.randrange(1, 30)
    then = start + datetime.timedelta(days=days)
    return Drawn(f"Which date is {days} days after {start.isoformat()}?", then.isoformat(), f"{start},{days}")


class Dates(EverydayTask):
    """Weekdays, months and days that lie apart."""

    name = "dates"
    exercises: ClassVar[Mapping[str, Draw]] = {
        "weekday": _weekday,
        "month": _month,
        "between": _between,
        "later": _later,
    }
    groups = tuple(exercises)


# --- strings


def _reverse(stream: random.Random) -> Drawn:
    word = _word(stream)
    return Drawn(f"Write the word '{word}' backwards.", word[::-1], min(word, word[::-1]))


def _last(stream: random.Random) -> Drawn:
    word, end = _word(stream), stream.choice(("first", "last"))
    return Drawn(f"What is the {end} letter of the word '{word}'?", word[0 if end == "first" else -1], word)


def _count(stream: random.Random) -> Drawn:
    word = _word(stream) + _word(stream)
    letter = stream.choice(word)
    asked = f"How many times does the letter '{letter}' occur in the word '{word}'?"
    return Drawn(asked, str(word.count(letter)), word)


def _join(stream: random.Random) -> Drawn:
    first, second = _word(stream), _word(stream)
    return Drawn(
        f"Join the words '{first}' and '{second}'.", first + second, ",".join(sorted((first, second)))
    )


def _word(stream: random.Random) -> str:
    """A word of two or three syllables that means nothing."""
    return "".join(
        stream.choice("bdfklmnprst") + stream.choice("aeiou") for _ in range(stream.choice((2, 3)))
    )


class Strings(EverydayTask):
    """Letters of invented words."""

    name = "strings"
    exercises: ClassVar[Mapping[str, Draw]] = {
        "reverse": _reverse,
        "last": _last,
        "count": _count,
        "join": _join,
    }
    groups = tuple(exercises)


EVERYDAY: dict[str, type[GeneratedTask]] = {task.name: task for task in (WordProblems, Units, Dates, Strings)}
"""By name."""
