"""What is read of a server's responses, in OpenAI's protocol; a server may say more, and it is passed over."""

import json
import math
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from selfdev.factory.journal import Answer

_GIVEN_UP = ("abort", "error")
"""Why an answer ends that the server did not bring to its end: what vLLM and SGLang say."""


def retry_after(value: str | None) -> float | None:
    """Seconds that the header asks for, which may also be a date; None if it is absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def error_message(content: bytes) -> str:
    """The message in an error's body: `error.message`, `message`, `detail`, or the body itself."""
    text = content.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else text


class _Model(BaseModel):
    id: str


class Models(BaseModel):
    """The models that a server lists."""

    data: list[_Model]


class _Message(BaseModel):
    content: str | None = None


class _TokenLogProb(BaseModel):
    logprob: float | None


class _LogProbs(BaseModel):
    """Of a continued text the first field, of a message the second."""

    token_logprobs: list[float | None] | None = None
    content: list[_TokenLogProb] | None = None

    def of(self, tokens: Sequence[int] | None) -> tuple[float, ...] | None:
        """One for every token; None unless there are just so many, all finite."""
        found = self.token_logprobs if self.content is None else [each.logprob for each in self.content]
        known = [each for each in found or () if each is not None and math.isfinite(each)]
        return tuple(known) if tokens is not None and len(known) == len(tokens) else None


class _Choice(BaseModel):
    finish_reason: str | None = None
    text: str | None = None
    message: _Message | None = None
    token_ids: list[int] | None = None
    logprobs: _LogProbs | None = None


class _Counted(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class Completion(BaseModel):
    """What a server wrote, of a continued text or in answer to a message."""

    choices: list[_Choice]
    usage: _Counted | None = None

    def answer(self) -> Answer:
        """The first choice.

        Raises:
            ValueError: there is none, or it holds neither text nor message, or the server gave it up half-way.
        """
        if not self.choices or (self.choices[0].text is None and self.choices[0].message is None):
            raise ValueError("no choice")
        if self.choices[0].finish_reason in _GIVEN_UP:
            raise ValueError("given up")
        choice, usage = self.choices[0], self.usage or _Counted()
        text = choice.text if choice.message is None else choice.message.content
        return Answer(
            text=text or "",  # a message without content: a refusal
            finished=choice.finish_reason != "length",
            tokens=None if choice.token_ids is None else tuple(choice.token_ids),
            log_probs=None if choice.logprobs is None else choice.logprobs.of(choice.token_ids),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )
