"""The next tokens' logits, for many rows that continue a few prompts.

Where the architecture allows it, each prompt is computed once and shared by its rows (`models/shared_prefix.py`). That
is found out by trying, since an architecture with attention of its own would not complain, only answer wrongly.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfdev.models.cache import LayerCache, layers, read
from selfdev.models.limits import WINDOW, context_limit
from selfdev.models.output_head import head_in_blocks
from selfdev.models.shared_prefix import OTHER_ARCHITECTURE, SharedPrefix, alike, attending

log = logging.getLogger(__name__)


class Row(Protocol):
    """What a decoder must know of a row: the index of its prompt, and the tokens written so far, at least one."""

    prompt: int
    tokens: list[int]


class Decoder(Protocol):
    """Has read the prompts."""

    first: list[Tensor]
    """For each prompt the logits after its last token, shape (1, vocabulary)."""

    def begin(self, rows: Sequence[Row]) -> "Batch":
        """Take up some rows, those of one prompt side by side; several batches share the prompts."""


class Batch(Protocol):
    """Computes logits; the places of its rows are kept in step with the caller's list."""

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Feed each row's latest token; returns the logits after it, shape (rows, vocabulary)."""

    def replace(self, place: int, prompt: int) -> None:
        """A new row of this prompt takes a place."""

    def keep(self, kept: Sequence[int]) -> None:
        """Keep the rows in these places, in this order."""


@contextmanager
def decoding(model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int) -> Iterator[Decoder]:
    """Read the prompts, and decode within.

    Args:
        model: a causal language model, in evaluation mode; within, its attention and its output layer are replaced.
        prompts: token ids of each.
        capacity: the longest continuation, in tokens.
    """
    with head_in_blocks(model):
        window = context_limit(model.config, WINDOW)
        too_long = window is not None and max(map(len, prompts)) + capacity > window[1]
        if too_long or not shares_prefix(model):
            log.warning(
                "a %s cannot share its prompt's computation, so sampling is slow; let a server write, see "
                "factory.endpoint",
                type(model).__name__,
            )
            yield _Plain(model, prompts)
            return
        decoder = _Shared(model, prompts, capacity)
        with attending(model):
            yield decoder


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether the model computes the same with a shared prompt as without, found out on six tokens."""
    tokens = [i % model.config.get_text_config().vocab_size for i in range(6)]
    expected = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
    row = _Tokens(0, tokens[4:5])
    try:
        batch = _Shared(model, [tokens[:4]], 2).begin([row])
        with attending(model):
            batch.step([row])
            row.tokens.append(tokens[5])
            logits = batch.step([row])[0].float()
    except torch.OutOfMemoryError:
        raise
    except OTHER_ARCHITECTURE:
        return False
    return alike(logits, expected, expected, model.dtype)


@torch.no_grad()
def kept_a_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that are kept for each token while rows are decoded; 0 where none can be shared."""
    if not shares_prefix(model):
        return 0
    [cache], _ = _prefill(model, [[0]])
    return sum(each.nbytes for layer in cache for each in layer)


class _Tokens:
    def __init__(self, prompt: int, tokens: list[int]):
        self.prompt, self.tokens = prompt, tokens


class _Shared:
    """Each prompt is read once; what all begin with, once for all, and most of a prompt that is like the one before."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int):
        self.model, self.capacity = model, capacity
        self.lengths = [len(prompt) for prompt in prompts]
        self.caches, self.first = _prefill(model, prompts)

    def begin(self, rows: Sequence[Row]) -> "_SharedBatch":
        counts = [sum(row.prompt == number for row in rows) for number in range(len(self.caches))]
        return _SharedBatch(self.model, self.lengths, SharedPrefix(self.caches, counts, self.capacity))


class _SharedBatch:
    """Rows that continue prompts which are kept once."""

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int], shared: SharedPrefix):
        self.model, self.lengths, self.shared = model, lengths, shared

    def step(self, rows: Sequence[Row]) -> Tensor:
        device = self.model.device
        latest = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        position = [[self.lengths[row.prompt] + len(row.tokens) - 1] for row in rows]
        out = self.model(
            latest,
            position_ids=torch.tensor(position, device=device),
            use_cache=False,
            shared_prefix=self.shared,
        )
        self.shared.advance()
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def replace(self, place: int, prompt: int) -> None:
        self.shared.replace(place, prompt)

    def keep(self, kept: Sequence[int]) -> None:
        self.shared.keep(torch.tensor(kept, dtype=torch.long))


class _Plain:
    """Every row goes through the model from its prompt's first token: right for any causal model, and slow."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]):
        self.model, self.prompts = model, prompts
        self.first = [self._after(prompt) for prompt in prompts]

    def begin(self, rows: Sequence[Row]) -> "_Plain":
        return self  # it keeps nothing of its rows

    def step(self, rows: Sequence[Row]) -> Tensor:
        return torch.cat([self._after([*self.prompts[row.prompt], *row.tokens]) for row in rows])

    def replace(self, place: int, prompt: int) -> None:
        pass

    def keep(self, kept: Sequence[int]) -> None:
        pass

    def _after(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.model(ids, use_cache=False).logits[:, -1]  # type: ignore[no-any-return]


def _prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[LayerCache]], list[Tensor]]:
    """Returns each prompt's keys and values, layer by layer, and the logits after its end, shape (1, vocabulary)."""
    common = _alike(*prompts) if len(prompts) > 1 else 0
    past: Any = None
    if common:
        _, past = read(model, prompts[0][:common])
    caches, logits = [], []
    latest, before = past, list[int]()
    for prompt in prompts:
        known, begun = common, copy.deepcopy(past)
        # Prompts of a repair turn begin with one usual prompt; the few words that usual ones share are left alone.
        if (alike := _alike(prompt, before)) > (common + len(prompt)) / 2:
            known, begun = alike, copy.deepcopy(latest)
            begun.crop(alike - len(before))
        after, latest = read(model, prompt[known:], behind=begun)
        before = list(prompt)
        caches.append(layers(latest))
        logits.append(after)
    return caches, logits


def _alike(*prompts: Sequence[int]) -> int:
    """How many tokens all of them begin with, but for a last one, so that each has a token left to be read."""
    columns = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return max(0, min(sum(1 for _ in columns), min(map(len, prompts)) - 1))
