"""Attention for many rows that continue a few prompts: each prompt's keys and values are kept once.

Otherwise every row of a batch carries its own copy of its prompt's keys and values, and each decoding
step reads all the copies. Here a row's query meets the one copy of its prompt and the row's own
continuation in two pieces, and the two softmax pieces are joined by their log-sum-exp, which is exact
(Juravsky et al. 2024, "Hydragen", arXiv 2402.05099).

Works with the transformers models that call the attention interface with rotated keys (Llama, Mistral,
Qwen, SmolLM, ...). A sliding window must be at least as long as prompt and continuation together; the
sampler checks it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "selfdev_shared_prefix"

LayerCache = tuple[Tensor, Tensor]
"""One layer's keys and values, each of shape (..., kv heads, tokens, head size)."""


class SharedPrefix:
    """The prompts' keys and values, once each, and every row's continuation, in preallocated buffers.

    Rows of one prompt are neighbours, and all rows are at the same position of their continuation.

    Args:
        prompts: for each prompt and layer, its keys and values, shape (kv heads, tokens, head size).
        rows: how many rows continue each prompt.
        capacity: the longest continuation, in tokens.
    """

    def __init__(self, prompts: Sequence[Sequence[LayerCache]], rows: Sequence[int], capacity: int):
        self.prompts = prompts
        self.rows = list(rows)
        self.length = 0
        keys = prompts[0][0][0]
        shape = (sum(rows), keys.shape[0], capacity, keys.shape[2])
        self.continuations = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in prompts[0]]

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerCache:
        """Write one token's key and value for every row; returns the layer's continuation with it."""
        keys, values = self.continuations[layer]
        now = self.length
        keys[:, :, now : now + 1] = key
        values[:, :, now : now + 1] = value
        return keys[:, :, : now + 1], values[:, :, : now + 1]

    def keep(self, kept: Tensor) -> None:
        """Drop every row whose index is not in `kept` (ascending), so that no step is spent on it."""
        ends = torch.tensor(self.rows).cumsum(0)
        owner = torch.bucketize(kept, ends, right=True)
        self.rows = torch.bincount(owner, minlength=len(self.rows)).tolist()
        for layer, (keys, values) in enumerate(self.continuations):
            for buffer in (keys, values):
                buffer[: len(kept), :, : self.length] = buffer[kept, :, : self.length]
            self.continuations[layer] = (keys[: len(kept)], values[: len(kept)])


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax(query keys^T) values, and the log-sum-exp of the scores; batched matrices."""
    scores = query @ keys.transpose(-1, -2)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp_() @ values, lse


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: SharedPrefix,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """One decoding step; the signature is that of the transformers attention interface.

    Args:
        module: the attention layer, asked for its index.
        query: shape (rows, heads, 1, head size).
        key: the new token's key, shape (rows, kv heads, 1, head size).
        value: the new token's value, same shape.
        attention_mask: not needed: a row sees its whole prompt and its whole continuation.
        shared_prefix: the keys and values so far.
        scaling: factor on the scores.

    Returns:
        The output, shape (rows, 1, heads, head size), and None in the place of the weights.
    """
    rows, heads, _one, size = query.shape
    layer, kv_heads = int(module.layer_idx), key.shape[1]  # type: ignore[arg-type]
    grouped = heads // kv_heads  # query heads that share a key
    query = query.reshape(rows, kv_heads, grouped, size) * scaling
    own, own_lse = _attend(query, *shared_prefix.append(layer, key, value))
    pieces, start = [], 0
    for prompt, count in zip(shared_prefix.prompts, shared_prefix.rows, strict=True):
        if count:
            # All rows of one prompt meet its keys in a single matrix product.
            wide = query[start : start + count].transpose(0, 1).reshape(kv_heads, count * grouped, size)
            shape = (kv_heads, count, grouped, -1)
            pieces.append([part.reshape(shape).transpose(0, 1) for part in _attend(wide, *prompt[layer])])
            start += count
    shared, shared_lse = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    merged = torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse))
    return merged.reshape(rows, 1, heads, size), None


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` attends by `shared_prefix_attention`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
