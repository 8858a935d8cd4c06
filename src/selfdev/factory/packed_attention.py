"""Attention within a pack: a prompt and its completions in one sequence, where no completion sees another.

A mask over the whole sequence would hide most of its pairs of tokens after they have been computed. Here the pack is
cut into *stretches*, and each meets only the keys that it may see. No scores are kept for the backward pass: they are
computed again there, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135).

Works with the models of transformers that call the attention interface; see `models/shared_prefix.py`. Gradients add up
in a fixed order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from selfdev.errors import UserError

IMPLEMENTATION = "selfdev_packed"

BLOCK = 128
"""Tokens of the prompt in one stretch: shorter ones hide fewer pairs of tokens, longer ones are larger matrices."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens; each sees the first `prefix` tokens of the pack, and its own stretch up to itself."""

    start: int
    end: int
    prefix: int

    @property
    def rows(self) -> slice:
        """Where it lies in the pack."""
        return slice(self.start, self.end)


def stretches(prompt: int, completions: Sequence[int]) -> list[Stretch]:
    """Cut a pack up.

    Args:
        prompt: its length in tokens.
        completions: the length of each, in tokens.
    """
    found = [Stretch(start, min(start + BLOCK, prompt), start) for start in range(0, prompt, BLOCK)]
    start = prompt
    for length in completions:
        found.append(Stretch(start, start + length, prompt))
        start += length
    return found


class _Packed(torch.autograd.Function):
    """Shapes: query (heads, tokens, head size), scaled; key and value (kv heads, tokens, head size)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Sequence[Stretch]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.pack = pack
        out = torch.empty_like(query)
        for stretch in pack:
            weights = _weights(query, key, stretch)
            out[:, stretch.rows] = (weights @ _seen(value, stretch)).view(len(query), -1, query.shape[2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for stretch in ctx.pack:
            weights = _weights(query, key, stretch)
            grad = _by_key(grads[0], len(key), stretch)
            _add_seen(to_value, weights.transpose(1, 2) @ grad, stretch)
            to_weights = grad @ _seen(value, stretch).transpose(1, 2)
            # d softmax: weights * (to_weights - sum of weights * to_weights)
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            found = to_scores @ _seen(key, stretch)
            to_query[:, stretch.rows] = found.view(len(query), -1, query.shape[2])
            _add_seen(to_key, to_scores.transpose(1, 2) @ _by_key(query, len(key), stretch), stretch)
        return to_query, to_key, to_value, None


def _by_key(tensor: Tensor, kv_heads: int, stretch: Stretch) -> Tensor:
    """A stretch of a tensor of the query's shape, heads that share a key together: (kv heads, rows, head size)."""
    return tensor[:, stretch.rows].reshape(kv_heads, -1, tensor.shape[2])


def _seen(tensor: Tensor, stretch: Stretch) -> Tensor:
    """The keys or values that a stretch may see, its own last."""
    return torch.cat([tensor[:, : stretch.prefix], tensor[:, stretch.rows]], 1)


def _add_seen(to: Tensor, grad: Tensor, stretch: Stretch) -> None:
    to[:, : stretch.prefix] += grad[:, : stretch.prefix]
    to[:, stretch.rows] += grad[:, stretch.prefix :]


def _weights(query: Tensor, key: Tensor, stretch: Stretch) -> Tensor:
    """What each row of a stretch gives to what it may see, shape (kv heads, rows, tokens seen)."""
    scores = _by_key(query, len(key), stretch) @ _seen(key, stretch).transpose(1, 2)
    own = stretch.end - stretch.start
    later = torch.ones(own, own, dtype=torch.bool, device=query.device).triu_(1)
    # As (kv heads, heads that share a key, tokens, tokens): the same for all heads.
    scores.view(len(key), -1, own, scores.shape[2])[..., stretch.prefix :].masked_fill_(later, float("-inf"))
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
    out: Tensor = _Packed.apply(query[0] * scaling, key[0], value[0], pack)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
