"""Attention for many rows that continue a few prompts: each prompt's keys and values are kept once.

The factory's rows continue one prompt each by sampling; the evaluation's rows are questions behind common few-shot
examples, which differ in length and are padded on the left.

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

    Rows of one prompt are neighbours, and all rows' continuations have the same length, padding included.

    Args:
        prompts: for each prompt and layer, its keys and values, shape (kv heads, tokens, head size).
        rows: how many rows continue each prompt.
        capacity: the longest continuation, in tokens.
        padding: how many of the first tokens of each row's continuation are padding, shape (rows,); none by default.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[LayerCache]],
        rows: Sequence[int],
        capacity: int,
        padding: Tensor | None = None,
    ):
        self.prompts = prompts
        self.rows = list(rows)
        self.length = 0
        self.padding = padding
        self._hidden: tuple[int, Tensor] | None = None
        keys = prompts[0][0][0]
        shape = (sum(rows), keys.shape[0], capacity, keys.shape[2])
        self.continuations = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in prompts[0]]

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerCache:
        """Write the next tokens' keys and values for every row; returns the layer's continuation with them."""
        keys, values = self.continuations[layer]
        now, then = self.length, self.length + key.shape[2]
        keys[:, :, now:then] = key
        values[:, :, now:then] = value
        return keys[:, :, :then], values[:, :, :then]

    def hidden(self, tokens: int) -> Tensor | None:
        """What of the continuation each of the next `tokens` tokens must not see: padding, and what follows it.

        Returns:
            True where it must not, shape (rows, 1, tokens, length + tokens); None if nothing is hidden.
        """
        if self.padding is None and tokens == 1:
            return None
        if self._hidden is None or self._hidden[0] != tokens:  # the same for all layers of a step
            device = self.continuations[0][0].device
            place = torch.arange(self.length + tokens, device=device)
            own = place[self.length :, None]
            hidden = (place > own)[None].expand(sum(self.rows), -1, -1)
            if self.padding is not None:
                # A padding token sees itself, lest it see nothing, which is no number.
                hidden = hidden | ((place < self.padding.to(device)[:, None, None]) & (place != own))
            self._hidden = (tokens, hidden[:, None])
        return self._hidden[1]

    def advance(self, tokens: int) -> None:
        """Count the tokens just written, once all layers have seen them."""
        self.length += tokens
        self._hidden = None

    def keep(self, kept: Tensor) -> None:
        """Keep the rows with these indices, in this order, so that no step is spent on the others.

        Only rows whose place changes are copied. Rows of one prompt stay neighbours, and prompts in their order.
        """
        ends = torch.tensor(self.rows).cumsum(0)
        owner = torch.bucketize(kept, ends, right=True)
        self.rows = torch.bincount(owner, minlength=len(self.rows)).tolist()
        moved = torch.nonzero(kept != torch.arange(len(kept)))[:, 0]
        for layer, (keys, values) in enumerate(self.continuations):
            for buffer in (keys, values):
                buffer[moved, :, : self.length] = buffer[kept[moved], :, : self.length]
            self.continuations[layer] = (keys[: len(kept)], values[: len(kept)])
        self.padding = None if self.padding is None else self.padding[kept]
        self._hidden = None


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns softmax(query keys^T) values, and the log-sum-exp of the scores; batched matrices.

    `hidden`, of the shape of the scores, is True where a query must not see a key.
    """
    scores = query @ keys.transpose(-1, -2)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
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
    """One decoding step, of one token or of several; the signature is that of the transformers attention interface.

    Args:
        module: the attention layer, asked for its index.
        query: shape (rows, heads, tokens, head size).
        key: the new tokens' keys, shape (rows, kv heads, tokens, head size).
        value: the new tokens' values, same shape.
        attention_mask: not needed: a row sees its whole prompt, and of its continuation what is not hidden.
        shared_prefix: the keys and values so far.
        scaling: factor on the scores.

    Returns:
        The output, shape (rows, tokens, heads, head size), and None in the place of the weights.
    """
    rows, heads, tokens, size = query.shape
    layer, kv_heads = int(module.layer_idx), key.shape[1]  # type: ignore[arg-type]
    queries = heads // kv_heads * tokens  # of one row that share a key: some heads, all new tokens
    query = query.reshape(rows, kv_heads, queries, size) * scaling
    hidden = shared_prefix.hidden(tokens)
    if hidden is not None:
        hidden = hidden.repeat(1, 1, heads // kv_heads, 1)  # the same for every head
    own, own_lse = _attend(query, *shared_prefix.append(layer, key, value), hidden)
    pieces, start = [], 0
    for prompt, count in zip(shared_prefix.prompts, shared_prefix.rows, strict=True):
        if count:
            # All rows of one prompt meet its keys in a single matrix product.
            wide = query[start : start + count].transpose(0, 1).reshape(kv_heads, count * queries, size)
            shape = (kv_heads, count, queries, -1)
            pieces.append([part.reshape(shape).transpose(0, 1) for part in _attend(wide, *prompt[layer])])
            start += count
    shared, shared_lse = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    merged = torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse))
    return merged.reshape(rows, heads, tokens, size).transpose(1, 2).contiguous(), None


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
