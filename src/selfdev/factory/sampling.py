"""Sampling programs from a causal language model, in process.

A batch of rows is kept full: the place of a program that has ended is taken by the next one, in the order of their
numbers. On a CPU there are several batches side by side (`lanes.py`). What a program is depends on its own random
stream and, by rounding, on the rows beside it. Which rows these are follows from the lengths of the earlier programs,
and so, by induction over the steps, from the prompts, the seeds and the settings alone: never from timing or from the
number of workers. It holds for one call on one machine with one number of threads; an iteration is therefore written
in a single call (with a repair turn in several, each of which follows from those before), and a resumed one is
written anew from its first program.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from threading import Event

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.decoder import Decoder, decoding
from selfdev.factory.drawing import draw
from selfdev.factory.grammar import Grammar
from selfdev.factory.lanes import in_lanes, lanes, side_by_side
from selfdev.models.limits import CONTEXT, context_limit, end_tokens
from selfdev.models.shared_prefix import closed_up


@dataclass(frozen=True)
class Sample:
    """What the factory wrote.

    Attributes:
        tokens: the sampled ids, the stopping token included.
        text: the tokens decoded, without special tokens.
        log_probs: log-probability of each token at temperature 1, before any cut and any grammar, in nats; None where a
            server does not tell them.
        finished: False if the limit on new tokens ended it.
        seconds: on the clock, from its first token to its last, or from its request to the answer; what is written
            beside it is included. None where nobody looked.
    """

    tokens: tuple[int, ...]
    text: str
    log_probs: tuple[float, ...] | None
    finished: bool
    seconds: float | None = field(default=None, compare=False)

    @property
    def log_prob(self) -> float | None:
        """Of all tokens."""
        return None if self.log_probs is None else sum(self.log_probs)


class Ending:
    """Knows from its tokens where a program ends: each token is decoded once, and no text at a step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], stop: re.Pattern[str]):
        self.ends, self.stop = ends, stop
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def piece(self, token: int) -> str:
        """The text of a token."""
        if token not in self._pieces:
            # Decoded behind itself, since some tokenizers drop the space before a text's first word.
            once, twice = (self._tokenizer.decode([token] * n) for n in (1, 2))
            self._pieces[token] = twice[len(once) :]
        return self._pieces[token]


class _Row:
    """One program: its prompt, its random stream, and what has been written."""

    def __init__(self, prompt: int, seed: int, limit: int, ending: Ending, grammar: Grammar | None):
        self.prompt = prompt
        self.writing = grammar.begin() if grammar else None
        self.uniform = torch.rand(limit, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.text = ""
        self.finished = False
        self.seconds = 0.0
        self._began = 0.0
        self._ending = ending

    @property
    def ended(self) -> bool:
        """Whether it is complete or at its limit."""
        return self.finished or len(self.tokens) == len(self.uniform)

    def add(self, token: int, log_prob: float) -> None:
        """Write one token."""
        now = time.perf_counter()
        self._began = self._began or now
        self.seconds = now - self._began
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        piece = self._ending.piece(token)
        self.text += piece
        self.finished = token in self._ending.ends or self._ending.stop.search(self.text) is not None
        if self.writing and not self.ended:
            self.writing.add(token, piece)

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """What has been written."""
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Sample(tuple(self.tokens), text, tuple(self.log_probs), self.finished, self.seconds)


@dataclass(frozen=True)
class Sampler:
    """How programs are drawn.

    Attributes:
        temperature: above 0.
        top_p: in (0, 1]: the smallest set of tokens with at least this probability is drawn from; 1 for all.
        max_new_tokens: where a program that does not end is cut.
        stop: a pattern; a program ends when it is found in what was written.
        top_k: only so many of the most likely tokens are drawn from; 0 for all.
        min_p: in [0, 1]: what is drawn has at least this share of the most likely token's probability; 0 for all.
        batch: rows written at once, in all lanes together; 0 for all.
        grammar: what may be written; None for anything.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: re.Pattern[str]
    top_k: int = 0
    min_p: float = 0.0
    batch: int = 0
    grammar: Grammar | None = None

    @torch.inference_mode()
    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        tick: Callable[[int, int], None] = lambda finished, tokens: None,
    ) -> list[list[Sample]]:
        """Write programs, those of the first prompt first.

        Args:
            model: a causal language model, in evaluation mode.
            tokenizer: its tokenizer.
            prompts: token ids of each prompt.
            rows: for each prompt, the random seed of every program that continues it.
            tick: called after each step with the programs finished and the tokens written; by one thread at a time, and
                with several lanes not by the caller's.

        Returns:
            For each prompt, its programs in order.

        Raises:
            UserError: prompt and continuation do not fit the model's context.
            SelfdevError: the model's logits are not finite.
        """
        check_context(model.config, max(map(len, prompts)) + self.max_new_tokens)
        ending = Ending(tokenizer, end_tokens(model, tokenizer), self.stop)
        written = [
            [_Row(number, seed, self.max_new_tokens, ending, self.grammar) for seed in seeds]
            for number, seeds in enumerate(rows)
        ]
        every = [row for group in written for row in group]
        told = threading.Lock()

        def tell() -> None:
            with told:
                tick(sum(row.ended for row in every), sum(len(row.tokens) for row in every))

        with decoding(model, prompts, self.max_new_tokens) as decoder:
            at_once = min(self.batch or len(every), len(every))
            shares = in_lanes(every, lanes(at_once) if model.device.type == "cpu" else 1)
            side_by_side(
                [partial(self._fill, share, decoder, -(-at_once // len(shares)), tell) for share in shares]
            )
        return [[row.sample(tokenizer) for row in group] for group in written]

    def _fill(
        self, rows: Sequence[_Row], decoder: Decoder, at_once: int, tell: Callable[[], None], stop: Event
    ) -> None:
        """Write rows, so many at once, until all have ended."""
        started = self._started(rows, decoder.first)
        alive = list(islice(started, at_once))
        batch = decoder.begin(alive)
        while alive and not stop.is_set():
            self._write(alive, batch.step(alive))
            for place, row in enumerate(alive):
                if row.ended and (following := next(started, None)) is not None:
                    alive[place] = following
                    batch.replace(place, following.prompt)
            going = [place for place, row in enumerate(alive) if not row.ended]
            if len(going) < len(alive):
                kept = closed_up(going)
                batch.keep(kept)
                alive = [alive[place] for place in kept]
            tell()

    def _started(self, rows: Sequence[_Row], logits: Sequence[Tensor]) -> Iterator[_Row]:
        """Draw each row's first token when its turn has come; gives the rows that this does not end."""
        for row in rows:
            self._write([row], logits[row.prompt])
            if not row.ended:
                yield row

    def _write(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Draw a token for every row from logits of shape (rows, vocabulary)."""
        writings = [row.writing for row in rows if row.writing]
        allowed = torch.stack([writing.allowed() for writing in writings]) if writings else None
        tokens, log_probs = draw(
            logits,
            torch.tensor([row.uniform[len(row.tokens)] for row in rows], device=logits.device),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            allowed=None if allowed is None else allowed.to(logits.device),
        )
        if not log_probs.isfinite().all():
            raise SelfdevError("the factory's logits are not finite: its weights or its adapters are broken")
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.add(token, log_prob)


def check_context(
    config: PreTrainedConfig,
    tokens: int,
    way_out: str = "use fewer examples or a smaller factory.max_new_tokens",
) -> None:
    """Raise UserError unless a model of this config can hold so many tokens."""
    limit = context_limit(config, CONTEXT)
    if limit is not None and tokens > limit[1]:
        raise UserError(
            f"the factory's prompt and {limit[0]} do not fit: prompt and continuation need {tokens} tokens "
            f"and the model has {limit[1]}; {way_out}"
        )
