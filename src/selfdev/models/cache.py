"""The keys and values of what a model has read.

transformers 5.24 renamed them from `past_key_values` to `cache`, and 5.40 is to forget the former name; models that
come with their own code may keep it longer.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LayerCache = tuple[Tensor, Tensor]
"""One layer's keys and values, each of shape (..., kv heads, tokens, head size)."""


def read(model: Any, tokens: Sequence[int], behind: Any = None) -> tuple[Tensor, Any]:
    """Have a model read at least one token.

    Args:
        model: a causal language model of transformers.
        tokens: what it reads.
        behind: a cache of this function, whose tokens it has read before; it may be changed.

    Returns:
        Logits after the last token, shape (1, vocabulary), and the cache with all tokens.
    """
    ids = torch.tensor([list(tokens)], device=model.device)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = model(ids, use_cache=True, logits_to_keep=1, **({} if behind is None else {name: behind}))
    return out.logits[:, -1], getattr(out, name)


def layers(cache: Any) -> list[LayerCache]:
    """The keys and values, layer by layer, shape (kv heads, tokens, head size)."""
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]
