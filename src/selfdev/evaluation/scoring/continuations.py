"""Rows that continue one common beginning, each at its own length, and the attention over both.

The common beginning, such as few-shot examples, is kept once. A row's query meets it and the row's own tokens in two
products under one softmax, so that no row carries a copy (the split of Juravsky et al. 2024, "Hydragen", arXiv
2402.05099). Rows differ in length, so one that has finished can give its place to the next question at once, and the
batch stays full to the end (continuous batching: Yu et al. 2022, "Orca").

Works with the transformers models that call the attention interface with rotated keys (Llama, Mistral, Qwen, SmolLM,
...). Refused are attentions that do more than a softmax over scaled products. A sliding window must be at least as
long as a whole sequence; `check_fits` sees to it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from selfdev.errors import UserError
from selfdev.models import shared_prefix
from selfdev.models.cache import LayerCache, layers, read

IMPLEMENTATION = "selfdev_continuations"

QUERIES = 512
"""Tokens of a prompt that attend at once: it bounds the mask, and skips most of what the later ones alone may see."""


class Continuations:
    """The keys and values of a common beginning, and of what each row has behind it.

    The rows that go on lie first in preallocated buffers, in the order in which they came.

    Args:
        common: for each layer the beginning's keys and values, shape (kv heads, tokens, head size).
        rows: the most at once.
        capacity: the longest of them behind the beginning, in tokens.

    Attributes:
        lengths: tokens of each row behind the beginning, shape (rows now,).
    """

    def __init__(self, common: Sequence[LayerCache], rows: int, capacity: int):
        keys = common[0][0]
        self.common = common
        self.lengths = torch.zeros(0, dtype=torch.long, device=keys.device)
        shape = (rows, keys.shape[0], capacity, keys.shape[2])
        # Zeros, since what lies behind a row's end is multiplied by 0, and chance memory may hold what is no number.
        self._own = [(keys.new_zeros(shape), keys.new_zeros(shape)) for _ in common]
        self._reading = False
        self._hidden = torch.zeros(0)

    def read(self, forward: Callable[..., Any], sequences: Sequence[list[int]]) -> Any:
        """Begin new rows.

        Args:
            forward: the model, or its body without the head.
            sequences: the rows' tokens behind the beginning, at least one each.

        Returns:
            What `forward` returns, of shape (new rows, longest, ...), padded on the right.
        """
        counts = [len(each) for each in sequences]
        longest = max(counts)
        # Padding lies behind a row's own tokens, which cannot see it, so any token serves.
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in sequences])
        places = torch.arange(longest).expand(len(counts), -1)
        self.lengths = torch.cat([self.lengths, self.lengths.new_tensor(counts)])
        self._reading = True
        return self._forward(forward, ids, places)

    def step(self, forward: Callable[..., Any], tokens: Sequence[int]) -> Any:
        """Write one token behind every row; returns what `forward` returns, of shape (rows, 1, ...)."""
        used = int(self.lengths.max()) + 1
        self._hidden = torch.arange(used, device=self.lengths.device) > self.lengths[:, None]
        self._reading = False
        out = self._forward(forward, torch.tensor(tokens)[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1
        return out

    def keep(self, going: Sequence[int]) -> list[int]:
        """Drop all rows but these; returns the rows that now lie at the places 0, 1, ..., see `closed_up`."""
        kept = shared_prefix.closed_up(going)
        for to, place in enumerate(kept):
            if to != place:
                length = int(self.lengths[place])
                for keys, values in self._own:
                    keys[to, :, :length] = keys[place, :, :length]
                    values[to, :, :length] = values[place, :, :length]
        self.lengths = self.lengths[kept]
        return kept

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What the new tokens see, shape (rows, heads, tokens, head size).

        Args:
            layer: its index.
            query: shape (rows, heads, tokens, head size).
            key: shape (rows, kv heads, tokens, head size).
            value: same shape.
            scaling: factor on the scores.
        """
        if self._reading:
            return self._attend_reading(layer, query, key, value, scaling)
        return self._attend_step(layer, query * scaling, key, value)

    def _forward(self, forward: Callable[..., Any], ids: Tensor, places: Tensor) -> Any:
        device, common = self.lengths.device, self.common[0][0].shape[1]
        return forward(
            input_ids=ids.to(device),
            position_ids=common + places.to(device),
            use_cache=False,
            continuations=self,
        )

    def _attend_reading(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        rows, heads, tokens, size = query.shape
        kv_heads = key.shape[1]
        new = slice(len(self.lengths) - rows, len(self.lengths))
        for buffer, fresh in zip(self._own[layer], (key, value), strict=True):
            buffer[new, :, :tokens] = fresh
        keys, values = (
            torch.cat([common.expand(rows, -1, -1, -1), fresh], dim=2)
            for common, fresh in zip(self.common[layer], (key, value), strict=True)
        )
        count = keys.shape[2] - tokens
        # Heads that share a key stand side by side as more queries, so that no key is repeated for them.
        query = query.reshape(rows, kv_heads, heads // kv_heads, tokens, size)
        out = torch.empty_like(query)
        for first in range(0, tokens, QUERIES):
            last = min(first + QUERIES, tokens)
            place = torch.arange(count + last, device=query.device)
            seen = (place <= place[count + first :, None]).repeat(heads // kv_heads, 1)
            part = F.scaled_dot_product_attention(
                query[:, :, :, first:last].flatten(2, 3),
                keys[:, :, : count + last],
                values[:, :, : count + last],
                attn_mask=seen,
                scale=scaling,
            )
            out[:, :, :, first:last] = part.unflatten(2, (heads // kv_heads, last - first))
        return out.reshape(rows, heads, tokens, size)

    def _attend_step(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, _, size = query.shape
        kv_heads, used = key.shape[1], self._hidden.shape[1]
        group = heads // kv_heads  # heads that share a key
        every = torch.arange(rows, device=query.device)
        for buffer, fresh in zip(self._own[layer], (key, value), strict=True):
            buffer[every, :, self.lengths] = fresh[:, :, 0]
        keys, values = (buffer[:rows, :, :used] for buffer in self._own[layer])
        common_keys, common_values = self.common[layer]
        count = common_keys.shape[1]
        query = query.reshape(rows, kv_heads, group, size)
        scores = query.new_empty(kv_heads, rows, group, count + used)
        # All rows meet the common keys in one product a head.
        wide = query.transpose(0, 1).reshape(kv_heads, rows * group, size)
        scores[..., :count] = (wide @ common_keys.transpose(1, 2)).view(kv_heads, rows, group, count)
        own = (query @ keys.transpose(2, 3)).masked_fill_(self._hidden[:, None, None], float("-inf"))
        scores[..., count:] = own.transpose(0, 1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        out = weights[..., count:].transpose(0, 1) @ values
        shared = weights[..., :count].reshape(kv_heads, rows * group, count) @ common_values
        out += shared.view(kv_heads, rows, group, size).transpose(0, 1)
        return out.reshape(rows, heads, 1, size)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    continuations: Continuations,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as the interface of transformers wants it: (rows, tokens, heads, head size), and no weights.

    Raises:
        UserError: the model's attention caps its scores or has sinks.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            "the model's attention caps its scores or has sinks, which generation here cannot do; score the task by "
            "'exact', or take a model of another family"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return continuations.attend(layer, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)


def attending(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within it, `model` attends over `Continuations`."""
    return shared_prefix.attending(model, IMPLEMENTATION)


@torch.inference_mode()
def prefill(model: Any, tokens: Sequence[int]) -> list[LayerCache]:
    """The keys and values of at least one token, layer by layer, shape (kv heads, tokens, head size)."""
    return layers(read(model, tokens)[1])


@torch.inference_mode()
def check_continues(model: Any) -> None:
    """Make sure that a row behind a common beginning has the model's own logits, on seven tokens.

    An architecture whose attention does not go through transformers' interface would not complain, only not see what
    precedes.

    Raises:
        UserError: they differ, or there are none; or the attention caps its scores or has sinks.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [(7 * i + 1) % vocabulary for i in range(7)]
    expected = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
    if not expected.isfinite().all():
        return  # which scoring tells
    cause: Exception | None = None
    try:
        continuations = Continuations(prefill(model, tokens[:3]), 2, 4)
        with attending(model):
            continuations.read(model, [tokens[3:6], tokens[3:4]])
            logits = continuations.step(model, [tokens[6], tokens[4]]).logits[0, -1].float()
        right = shared_prefix.alike(logits, expected, expected, model.dtype)
    except torch.OutOfMemoryError:
        raise
    except shared_prefix.OTHER_ARCHITECTURE as error:
        right, cause = False, error
    if not right:
        raise UserError(
            f"a {type(model).__name__} ({model.config.model_type}) cannot be scored by 'generate' or 'loglikelihood' "
            "here: behind a common beginning it does not compute what it computes alone. Score the task by 'exact', or "
            "take a model of another family"
        ) from cause
