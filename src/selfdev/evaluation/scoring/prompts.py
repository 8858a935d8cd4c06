"""Prompts as tokens: what all have in common is kept once, beside each one's own rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from selfdev.errors import UserError
from selfdev.evaluation.scoring.continuations import prefill
from selfdev.evaluation.tasks import Question
from selfdev.models.cache import LayerCache
from selfdev.models.limits import CONTEXT, WINDOW, context_limit


@dataclass(frozen=True)
class Prompts:
    """Token sequences, split into their common beginning and each one's own rest.

    Attributes:
        shared: the tokens that all begin with, such as the few-shot examples; maybe none.
        rest: what follows them in each, at least one token.
    """

    shared: list[int]
    rest: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[list[int]]) -> "Prompts":
        """Split the sequences; `sequences` has at least one, and none is empty."""
        first, last = min(sequences), max(sequences)  # what these two share, all between them share
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        common = min(common, min(map(len, sequences)) - 1)
        return cls(first[:common], [sequence[common:] for sequence in sequences])

    @torch.inference_mode()
    def prefill(self, model: Any) -> list[LayerCache]:
        """The keys and values of the common beginning, layer by layer, shape (kv heads, tokens, head size)."""
        count = len(self.shared)
        # A model takes one token at least; of none, the shapes remain.
        cache = prefill(model, self.shared or self.rest[0][:1])
        return [(keys[:, :count], values[:, :count]) for keys, values in cache]

    def longest_first(self) -> list[int]:
        """Indices of the rests, so that neighbours have similar lengths."""
        return sorted(range(len(self.rest)), key=lambda i: -len(self.rest[i]))


def tokenize(tokenizer: Any, questions: Sequence[Question], texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, special tokens as the tokenizer puts them.

    Raises:
        UserError: there is no question, or a text holds something that the tokenizer has no token for.
    """
    if not questions:
        raise UserError("there is no question to score; ask for at least one")
    sequences: list[list[int]] = tokenizer(list(texts))["input_ids"]
    for question, ids in zip(questions, sequences, strict=True):
        if not ids:
            raise UserError(f"{question.named}: the prompt is empty")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise UserError(
                f"{question.named}: it holds a character that the tokenizer does not know; use the tokenizer of a "
                "model that was made for this task"
            )
    return sequences


def check_fits(config: Any, questions: Sequence[Question], lengths: Sequence[int], written: int) -> None:
    """Raise UserError unless every prompt and what is written behind it fit the model's context.

    Args:
        config: the model's.
        questions: named in the error.
        lengths: tokens of each prompt.
        written: the most tokens that follow one.
    """
    limit = context_limit(config, CONTEXT, WINDOW)
    if limit is None:
        return
    field, most = limit
    for question, length in zip(questions, lengths, strict=True):
        if length + written > most:
            raise UserError(
                f"{question.named}: prompt and answer need {length} + {written} tokens, and the model's context has "
                f"{most} ({field}); use fewer few-shot examples, a smaller max_new_tokens, or another model"
            )
