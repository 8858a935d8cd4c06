"""Grading: how an answer is written, read out of the text, and judged."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from selfdev.errors import UserError
from selfdev.evaluation.tasks.checkers import Checker, Exact

INVALID = "[invalid]"
"""What an extraction yields where it finds nothing; the word of lm-evaluation-harness."""


class Way(StrEnum):
    """How a model is scored on a question."""

    EXACT = "exact"
    """One teacher-forced pass: would greedy decoding write the gold answer and stop?"""
    GENERATE = "generate"
    """Greedy decoding until a stop string, then extraction and the checker."""
    LOGLIKELIHOOD = "loglikelihood"
    """Mean log-probability of the gold solution, in nats a token; for models too weak to answer."""


@dataclass(frozen=True)
class Extraction:
    """What of a text is the answer; as the filter `regex` of lm-evaluation-harness does it.

    Attributes:
        pattern: a regular expression; of a match with groups, the first group that is not empty counts.
        pick: which of the matches: 0 the first, -1 the last.
    """

    pattern: re.Pattern[str]
    pick: int = 0

    def __call__(self, text: str) -> str:
        """The answer in the text, or `INVALID`."""
        found = self.pattern.findall(text)
        if not found:
            return INVALID
        match = found[self.pick]
        if isinstance(match, tuple):
            match = next((part for part in match if part), INVALID)
        return str(match).strip()


@dataclass(frozen=True)
class Reading:
    """What was found in one text, and whether it is right."""

    extracted: str
    right: bool


@dataclass(frozen=True)
class Grading:
    """How answers are written, read and judged.

    Attributes:
        way: how a model is scored.
        stop: strings that end an answer, beside the model's end token.
        max_new_tokens: where an answer that does not end is cut.
        extractions: by name; the first one decides, the others are reported beside it. Without any, the whole
            text is the answer, spaces around it left out.
        checker: compares the answer with the gold one.
    """

    way: Way = Way.EXACT
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 16
    extractions: Mapping[str, Extraction] = field(default_factory=dict)
    checker: Checker = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if self.way is not Way.EXACT:
            return
        if self.extractions or self.checker != Exact():
            raise UserError(
                "scoring 'exact' compares the answer to the letter, so it takes no extraction and no checker but "
                "'exact' as it stands; use scoring 'generate'"
            )
        if any(len(stop) != 1 for stop in self.stop):
            raise UserError(
                "scoring 'exact' takes stop strings of one character, which one token can show; use "
                "scoring 'generate'"
            )

    def read(self, text: str, gold: str) -> dict[str, Reading]:
        """Judge a text, cut at its stop string, by every extraction; the first one decides."""
        if not self.extractions:
            return {"text": Reading(text.strip(), self.checker.right(text.strip(), gold.strip()))}
        found = {name: extraction(text) for name, extraction in self.extractions.items()}
        return {name: Reading(answer, self.checker.right(answer, gold)) for name, answer in found.items()}

    def cut(self, text: str) -> str:
        """The text before the first stop string in it."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
