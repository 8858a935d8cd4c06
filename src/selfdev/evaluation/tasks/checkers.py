"""Checkers: is this answer the gold one?"""

import re
import threading
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from selfdev.errors import UserError


class Checker(Protocol):
    """Compares an answer with the gold one."""

    def right(self, answer: str, gold: str) -> bool:
        """Whether the answer is right; one that cannot be parsed is wrong."""

    def check_gold(self, gold: str) -> None:
        """Raise ValueError if the gold answer cannot be parsed, so that no answer could be right."""


@dataclass(frozen=True)
class Exact:
    """The same text, as the metric `exact_match` of lm-evaluation-harness compares.

    Attributes:
        ignore: regular expressions whose matches are removed from both sides, in this order.
        ignore_case: compare in lower case.
    """

    ignore: tuple[str, ...] = ()
    ignore_case: bool = False

    def right(self, answer: str, gold: str) -> bool:
        """Whether the two are one text."""
        return self._plain(answer) == self._plain(gold)

    def check_gold(self, gold: str) -> None:
        """A gold answer of which nothing is left would make an empty answer right."""
        if not self._plain(gold).strip():
            raise ValueError("it is empty" + (" once `ignore` has been applied" if self.ignore else ""))

    def _plain(self, text: str) -> str:
        for pattern in self.ignore:
            text = re.sub(pattern, "", text)
        return text.lower() if self.ignore_case else text


@dataclass(frozen=True)
class Numeric:
    """The same number: `1,234.50`, `$1234.5` and `1234.50.` are one. No tolerance."""

    def right(self, answer: str, gold: str) -> bool:
        """Whether the two are one number."""
        try:
            return _number(answer) == _number(gold)
        except ValueError:
            return False

    def check_gold(self, gold: str) -> None:
        """Insist on a number."""
        _number(gold)


@dataclass(frozen=True)
class MathVerify:
    """Equal as mathematics, as the library math-verify judges; for LaTeX answers (extra `eval`)."""

    def right(self, answer: str, gold: str) -> bool:
        """Whether the library finds the two equal."""
        library = _math_verify()
        limit = {} if _may_interrupt() else {"timeout_seconds": None}
        return bool(library.verify(self._parse(gold), self._parse(answer), **limit))

    def check_gold(self, gold: str) -> None:
        """Insist on something that the library can parse."""
        if not self._parse(gold):
            raise ValueError("math-verify finds no mathematics in it")

    def _parse(self, text: str) -> Any:
        return _math_verify().parse(text, **({} if _may_interrupt() else {"parsing_timeout": None}))


CHECKERS: dict[str, type[Exact] | type[Numeric] | type[MathVerify]] = {
    "exact": Exact,
    "numeric": Numeric,
    "math-verify": MathVerify,
}
"""By the names that a task file gives them."""


def _number(text: str) -> Decimal:
    plain = re.sub(r"[,$€£%\s]", "", text).rstrip(".")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        raise ValueError("it is no number") from None
    if not number.is_finite():
        raise ValueError("it is no finite number")
    return number


def _may_interrupt() -> bool:
    """Whether math-verify may set its time-outs, which are signals and so the main thread's alone."""
    return threading.current_thread() is threading.main_thread()


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(
            "the checker 'math-verify' needs the package of that name: pip install 'selfdev[eval]'"
        ) from error
    return math_verify
