"""Attention for many rows that continue a few prompts: each prompt's keys and values are kept once.

Otherwise every row of a batch carries its own copy of its prompt's keys and values, and each decoding
step reads all the copies. Here a row's query meets the one copy of its prompt and the row's own
continuation in two pieces, and the two softmax pieces are joined by their log-sum-exp, which is exact
(Juravsky et al. 2024, "Hydragen", arXiv 2402.05099).

Works with the transformers models that call the attention interface with rotated keys (Llama, Mistral,
Qwen, SmolLM, GPT-NeoX, Gemma, ...) or with absolute positions (GPT-2, OPT). A sliding
window must be at least as long as prompt and continuation together; the sampler checks it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from selfdev.models.cache import LayerCache

IMPLEMENTATION = "selfdev_shared_prefix"


class SharedPrefix:
    """The prompts' keys and values, once each, and every row's continuation, in preallocated buffers.

    All rows write their next token in the same column. A row may be given up and its place taken by a new one, whose
    continuation begins at that column; the columns go round, so that a buffer as long as the longest continuation is
    enough for any number of rows.

    Args:
        prompts: for each prompt and layer, its keys and values, shape (kv heads, tokens, head size).
        rows: how many rows continue each prompt; at first, rows of one prompt are neighbours.
        capacity: the longest continuation, in tokens.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[LayerCache]],
        rows: Sequence[int],
        capacity: int,
    ):
        self.prompts = prompts
        self.capacity = capacity
        self.length = 0
        # How many of the first tokens of each row's continuation are none of its own, shape (rows,).
        self.padding: Tensor | None = None
        self._owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        self._groups: list[tuple[int, slice | Tensor]] | None = None
        self._hidden: Tensor | None = None
        keys = prompts[0][0][0]
        shape = (sum(rows), keys.shape[0], capacity, keys.shape[2])
        self.continuations = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in prompts[0]]

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self.continuations[0][0].device

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerCache:
        """Write the next token's keys and values for every row; returns the layer's columns with them."""
        keys, values = self.continuations[layer]
        column, then = self.length % self.capacity, self.length + 1
        keys[:, :, column] = key[:, :, 0]
        values[:, :, column] = value[:, :, 0]
        return keys[:, :, :then], values[:, :, :then]

    def hidden(self) -> Tensor | None:
        """What of the columns each row's next token must not see, since an earlier row in its place has left it.

        Returns:
            True where it must not, shape (rows, 1, 1, columns); None if nothing is hidden.
        """
        if self.padding is None:
            return None
        if self._hidden is None:  # the same for all layers of a step
            columns = torch.arange(min(self.length + 1, self.capacity), device=self.device)
            place = self.length - (self.length - columns) % self.capacity  # when each column was written last
            # A token sees itself, lest it see nothing, which is no number.
            hidden = (place < self.padding.to(self.device)[:, None]) & (place != self.length)
            self._hidden = hidden[:, None, None]
        return self._hidden

    def groups(self) -> list[tuple[int, slice | Tensor]]:
        """Each prompt that has rows, and these rows: a slice if they are neighbours, their indices otherwise."""
        if self._groups is None:
            self._groups = []
            for prompt in self._owner.unique().tolist():
                places = torch.nonzero(self._owner == prompt)[:, 0]
                first, last = int(places[0]), int(places[-1])
                neighbours = last - first + 1 == len(places)
                where = slice(first, last + 1) if neighbours else places.to(self.device)
                self._groups.append((prompt, where))
        return self._groups

    def advance(self) -> None:
        """Count the token just written, once all layers have seen it."""
        self.length += 1
        self._hidden = None

    def replace(self, place: int, prompt: int) -> None:
        """Give a row's place to a new row, which continues the prompt of this index and has written nothing yet."""
        if self.padding is None:
            self.padding = torch.zeros(len(self._owner), dtype=torch.long)
        self.padding[place] = self.length
        self._hidden = None
        if self._owner[place] != prompt:
            self._owner[place] = prompt
            self._groups = None

    def keep(self, kept: Tensor) -> None:
        """Keep the rows with these indices, in this order, so that no step is spent on the others.

        Only rows whose place changes are copied.
        """
        self._owner = self._owner[kept]
        self._groups = None
        moved = torch.nonzero(kept != torch.arange(len(kept)))[:, 0]
        used = min(self.length, self.capacity)
        for layer, (keys, values) in enumerate(self.continuations):
            for buffer in (keys, values):
                buffer[moved, :, :used] = buffer[kept[moved], :, :used]
            self.continuations[layer] = (keys[: len(kept)], values[: len(kept)])
        self.padding = None if self.padding is None else self.padding[kept]
        self._hidden = None


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, softcap: float | None, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns softmax(query keys^T) values, and the log-sum-exp of the scores; batched matrices.

    `hidden`, which broadcasts to the scores, is True where a query must not see a key.
    """
    scores = query @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32)
    # The largest weight is 1 / sum(exp(score - largest score)): cheaper than a logsumexp, which is another exp of all.
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.to(values.dtype) @ values, lse


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: SharedPrefix,
    scaling: float,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One decoding step; the signature is that of the transformers attention interface.

    Args:
        module: the attention layer, asked for its index.
        query: shape (rows, heads, 1, head size).
        key: the new token's keys, shape (rows, kv heads, 1, head size).
        value: the new token's values, same shape.
        attention_mask: not needed: a row sees its whole prompt, and of its continuation what is not hidden.
        shared_prefix: the keys and values so far.
        scaling: factor on the scores.
        softcap: bound on the scores' absolute value, as in Gemma 2; None for none.

    Returns:
        The output, shape (rows, 1, heads, head size), and None in the place of the weights.
    """
    rows, heads, size = *query.shape[:2], query.shape[3]
    layer, kv_heads = int(module.layer_idx), key.shape[1]  # type: ignore[arg-type]
    query = query.reshape(rows, kv_heads, heads // kv_heads, size) * scaling
    columns = shared_prefix.append(layer, key, value)
    own, own_lse = _attend(query, *columns, softcap, shared_prefix.hidden())
    shared, shared_lse = (
        torch.zeros_like(own),
        torch.full_like(own_lse, float("-inf")),
    )  # as of an empty prompt
    for prompt, places in shared_prefix.groups():
        # All rows of one prompt meet its keys in a single matrix product.
        mine = query[places].transpose(0, 1)
        wide = mine.reshape(kv_heads, -1, size)
        keys, values = shared_prefix.prompts[prompt][layer]
        if keys.shape[1]:
            part, part_lse = _attend(wide, keys, values, softcap)
            shared[places] = part.reshape(mine.shape).transpose(0, 1)
            shared_lse[places] = part_lse.reshape(*mine.shape[:-1], 1).transpose(0, 1)
    merged = torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse).to(own.dtype))
    return merged.reshape(rows, 1, heads, size), None


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


@contextmanager
def attending(model: PreTrainedModel, implementation: str = IMPLEMENTATION) -> Iterator[None]:
    """Within it, `model` attends by `shared_prefix_attention`, or by another implementation that is registered."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01}
"""Difference of two ways to compute the same, as a share of the logits' range; 0.05 for narrower types."""


OTHER_ARCHITECTURE = (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError)
"""What trying a model raises that attends in a way of its own, or has no cache or output layer, or others. Where memory
is short torch raises a RuntimeError too, which says nothing of the architecture."""


def alike(found: Tensor, expected: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether what two ways have computed differs by rounding alone, on the scale of some logits of the model."""
    spread = float(logits.max() - logits.min())
    return float((found - expected).abs().max()) <= TOLERANCE.get(dtype, 0.05) * spread


def closed_up(going: Sequence[int]) -> list[int]:
    """The places that go on, gaps filled from the end, so that few rows change theirs: [0, 2, 3] gives [0, 3, 2]."""
    count = len(going)
    stay = {place for place in going if place < count}
    late = iter(reversed([place for place in going if place >= count]))
    return [place if place in stay else next(late) for place in range(count)]
