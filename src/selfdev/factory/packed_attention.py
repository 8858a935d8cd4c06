"""Attention within a pack: a prompt and its completions in one sequence, where no completion sees another.

A mask over the whole sequence would hide most of its pairs of tokens after they have been computed. Here the pack is
cut into *stretches*. In one of completions all queries meet the prompt's keys in one large product, and each completion
its own keys in a small one; the scores lie side by side under one softmax. No scores are kept for the backward pass:
they are computed again there, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135).

Works with the models of transformers that call the attention interface; see `models/shared_prefix.py`. Gradients add up
in a fixed order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from selfdev.errors import UserError

IMPLEMENTATION = "selfdev_packed"

BLOCK = 128
"""Tokens of the prompt in one stretch: shorter ones hide fewer pairs of tokens, longer ones are larger matrices."""

TOGETHER = 512
"""Tokens of completions in one stretch, unless one alone is longer: all scores of a stretch exist at once."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring pieces of a pack whose attention is computed together.

    Attributes:
        prefix: every token of a piece sees the first `prefix` tokens of the pack, and its own piece up to itself.
        bounds: where each piece starts, and where the last one ends.
    """

    prefix: int
    bounds: tuple[int, ...]


def stretches(prompt: int, completions: Sequence[int]) -> list[Stretch]:
    """Cut a pack up.

    Args:
        prompt: its length in tokens.
        completions: the length of each, in tokens.
    """
    found = [Stretch(start, (start, min(start + BLOCK, prompt))) for start in range(0, prompt, BLOCK)]
    bounds = [prompt]
    for length in completions:
        end = bounds[-1] + length
        if len(bounds) > 1 and end - bounds[0] > TOGETHER:
            found.append(Stretch(prompt, tuple(bounds)))
            bounds = bounds[-1:]
        bounds.append(end)
    return [*found, Stretch(prompt, tuple(bounds))] if completions else found


class _Product(NamedTuple):
    """Some rows of a pack, the keys that they meet, and where that stands in the scores of their stretch."""

    rows: slice
    keys: slice
    at: tuple[slice, slice, slice]


def _products(stretch: Stretch, group: int) -> list[_Product]:
    """What is multiplied in a stretch: all its rows with the prefix, and each piece's rows with the piece's own keys.

    A token has `group` rows, one for each head that shares its key.
    """
    first, last = group * stretch.bounds[0], group * stretch.bounds[-1]
    every, prefix = slice(None), slice(stretch.prefix)
    found = [_Product(slice(first, last), prefix, (every, every, prefix))] if stretch.prefix else []
    for start, end in pairwise(stretch.bounds):
        own = slice(stretch.prefix, stretch.prefix + end - start)
        rows = slice(group * start, group * end)
        found.append(
            _Product(rows, slice(start, end), (every, slice(rows.start - first, rows.stop - first), own))
        )
    return found


class _Packed(torch.autograd.Function):
    """Shapes: query (heads, tokens, head size); key and value (kv heads, tokens, head size).

    In between, heads that share a key are neighbouring rows: (kv heads, tokens * heads that share, head size).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Sequence[Stretch], scaling: float
    ) -> Tensor:
        query = _to_rows(query, len(key))
        ctx.save_for_backward(query, key, value)
        ctx.pack, ctx.scaling = pack, scaling
        out = torch.zeros_like(query)
        for stretch in pack:
            products = _products(stretch, query.shape[1] // key.shape[1])
            weights = _weights(query, key, stretch, products, scaling)
            for rows, keys, at in products:
                out[:, rows].baddbmm_(weights[at], value[:, keys])
        return _to_heads(out, key.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaling, grad = ctx.scaling, _to_rows(grads[0], len(key))
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for stretch in ctx.pack:
            products = _products(stretch, query.shape[1] // key.shape[1])
            weights = _weights(query, key, stretch, products, scaling)
            to_weights = torch.zeros_like(weights)
            for rows, keys, at in products:
                to_value[:, keys].baddbmm_(weights[at].mT, grad[:, rows])
                to_weights[at].baddbmm_(grad[:, rows], value[:, keys].mT)
            # d softmax: weights * (to_weights - sum of weights * to_weights)
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            for rows, keys, at in products:
                to_query[:, rows].baddbmm_(to_scores[at], key[:, keys], alpha=scaling)
                to_key[:, keys].baddbmm_(to_scores[at].mT, query[:, rows], alpha=scaling)
        return _to_heads(to_query, key.shape[1]), to_key, to_value, None, None


def _to_rows(tensor: Tensor, kv_heads: int) -> Tensor:
    """From (heads, tokens, head size) to (kv heads, rows, head size)."""
    by_key: Tensor = tensor.unflatten(0, (kv_heads, -1))
    return by_key.transpose(1, 2).flatten(1, 2)


def _to_heads(rows: Tensor, tokens: int) -> Tensor:
    """Back from (kv heads, rows, head size)."""
    by_token: Tensor = rows.unflatten(1, (tokens, -1))
    return by_token.transpose(1, 2).flatten(0, 1)


def _weights(
    query: Tensor, key: Tensor, stretch: Stretch, products: Sequence[_Product], scaling: float
) -> Tensor:
    """What each row of a stretch gives to each key, shape (kv heads, rows, prefix + longest piece).

    First come the keys of the prefix, then those of the row's own piece; what a shorter piece has not is given nothing.
    """
    group = query.shape[1] // key.shape[1]
    lengths = [end - start for start, end in pairwise(stretch.bounds)]
    place = torch.cat([torch.arange(length, device=query.device) for length in lengths]).repeat_interleave(
        group
    )
    scores = query.new_empty(len(key), len(place), stretch.prefix + max(lengths))
    for rows, keys, at in products:
        scores[at].baddbmm_(query[:, rows], key[:, keys].mT, beta=0, alpha=scaling)
    own = scores[..., stretch.prefix :]
    own.masked_fill_(torch.arange(own.shape[2], device=own.device) > place[:, None], float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Sequence[Stretch],
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The signature is that of the transformers attention interface.

    Args:
        module: the attention layer.
        query: shape (1, heads, tokens, head size).
        key: shape (1, kv heads, tokens, head size).
        value: same shape as the key.
        attention_mask: not needed.
        pack: what `stretches` made of the pack.
        scaling: factor on the query.
        softcap: bound on the scores' absolute value, as in Gemma 2.
        s_aux: attention sinks, as in gpt-oss.

    Returns:
        The output, shape (1, tokens, heads, head size), and None in the place of the weights.

    Raises:
        UserError: the model's attention caps its scores or has sinks.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            "the factory's attention caps its scores or has sinks, which training here cannot do; take a model of "
            "another family"
        )
    out: Tensor = _Packed.apply(query[0], key[0], value[0], pack, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
