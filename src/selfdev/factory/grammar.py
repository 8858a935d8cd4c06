"""Decoding that writes valid Python with names in scope: which tokens may come next in a program.

Each line has a grammar of its own (`grammar_rules`), which llguidance matches token by token; what may stand in it
follows from the lines before (`grammar_place`). Matchers are kept, since programs of one prompt begin alike.
"""

import re
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selfdev.errors import UserError
from selfdev.factory.grammar_place import Inside, Place
from selfdev.factory.grammar_rules import rules_of

SIGNATURE = r"""
start: NAME "(deltas):\n" (/ {1,4}/)?
NAME: /[a-z0-9_][A-Za-z0-9_]{0,60}/
"""
"""Of the first line, behind the prompt's last word `def merge_`."""

KEPT = 128
"""Matchers that are kept, of about 1 MB each; to make one takes about 10 ms."""

_DOCSTRING = re.compile(r'\n?\s*"""(?s:.*?)"""[^\n]*\n')


class Grammar:
    """The grammar of short programs over the tokens of one tokenizer.

    Args:
        tokenizer: a fast one, with a token that ends a text.
        vocabulary: number of the model's logits.

    Raises:
        UserError: llguidance is not installed, or the tokenizer is another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int):
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise UserError(
                "factory.grammar: python needs llguidance: pip install 'selfdev[grammar]', or set it to none"
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
            raise UserError(
                "factory.grammar: python needs a tokenizer of the library tokenizers with an end token, and this "
                "model's is another one; set it to none"
            )
        self.version = f"llguidance {version('llguidance')}"
        self.end = int(tokenizer.eos_token_id)
        self.vocabulary = vocabulary
        self._tokens = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=self.end)
        self._prepared = lru_cache(KEPT)(self._prepare)

    def begin(self) -> "Writing":
        """A program of which nothing is written yet."""
        return Writing(self)

    def matcher(self, place: Place | None, inside: Inside, begun: str) -> Any:
        """Matches the line at a place, or the first one; see `rules_of`."""
        return self._prepared(place, inside, begun).deep_copy()

    def _prepare(self, place: Place | None, inside: Inside, begun: str) -> Any:
        from llguidance import LLMatcher

        rules = SIGNATURE if place is None else rules_of(place, inside, begun)
        return LLMatcher(self._tokens, LLMatcher.grammar_from_lark(rules), log_level=0)


class Writing:
    """One program that is being written."""

    def __init__(self, grammar: Grammar):
        self._grammar = grammar
        self._place: Place | None = None
        self._begin_line("")

    def _begin_line(self, begun: str) -> None:
        self._begun = begun
        self._line = begun
        self._line_tokens: list[int] = []
        self._inside = Inside()
        self._matcher = self._grammar.matcher(self._place, self._inside, begun)

    def allowed(self) -> Tensor:
        """Which tokens may come next; bool, shape (vocabulary,), on the CPU.

        If the grammar knows none, which a tokenizer that cannot spell the next word would do, the text may end.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=self._grammar.vocabulary, bitorder="little")
        if not bits.any():
            bits[self._grammar.end] = 1
        return torch.from_numpy(bits).bool()

    def add(self, token: int, text: str) -> None:
        """Write a token that is allowed; `text` is what it says."""
        self._matcher.consume_token(token)
        self._line += text
        self._line_tokens.append(token)
        end = self._end_of_line()
        if end is not None:
            line, begun = self._line[:end], self._line[end + 1 :]
            self._place = Place() if self._place is None else self._place.after(line)
            self._begin_line(begun)
        elif self._place is not None:
            self._look_inside(self._place)

    def _end_of_line(self) -> int | None:
        """Where the newline is that ends the line; None if it is not written yet."""
        docstring = _DOCSTRING.match(self._line)
        if docstring is not None:
            return docstring.end() - 1
        if self._line.lstrip().startswith('"'):
            return None
        end = self._line.find("\n", len(self._line) - len(self._line.lstrip("\n")))
        return None if end < 0 else end

    def _look_inside(self, place: Place) -> None:
        """Make the line's grammar again where what it says of its own names changes it."""
        if self._line.lstrip()[:1] in {'"', "#", ""}:
            return
        inside = Inside.of(self._line, place)
        if inside != self._inside:
            self._inside = inside
            self._matcher = self._grammar.matcher(place, inside, self._begun)
            self._matcher.consume_tokens(self._line_tokens)
