"""Arcee Fusion: only the most important changes of an expert."""

from functools import reduce

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import in_blocks
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import smallest
from selfdev.errors import UserError

# Added to probabilities before their logarithm.
_LEAST = 1e-8

# Entries whose importance is found at a time, in whole rows.
_BLOCK = 1 << 17


def arcee_fusion(
    task_vectors: Tensor, seed_tensor: Tensor, *, spread: float = 1.5, scale: float = 1.0
) -> Tensor:
    """Keep an expert's changes where their importance stands out (Arcee AI 2024, mergekit's Arcee Fusion; no paper).

    The importance of an entry is |d| times the divergence of its row: KL(softmax(seed + d) || softmax(seed))
    along the last dimension, 1e-8 added to each probability. Kept are the entries whose importance reaches
    median + spread (third - first quartile). The quartile q of n values is the one with the rank floor(q (n
    - 1)), from 0. The original takes one expert; the kept parts of several are added: our extension.

    mergekit gives the same for up to a million entries. Of larger tensors it estimates the quartiles from a
    million entries drawn at random, unseeded; here they are exact.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter), float32.
        spread: how far above the median, in interquartile ranges, at least 0; the original uses 1.5.
        scale: factor on the sum, any number; 1 is the original.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not spread >= 0.0:
        raise UserError(
            f"spread {spread}: it is a number of interquartile ranges; give one that is not negative"
        )
    kept = (_important(expert, seed_tensor, spread) for expert in task_vectors)
    return reduce(Tensor.add_, kept).mul_(scale)


def _important(expert: Tensor, seed_tensor: Tensor, spread: float) -> Tensor:
    importance = _importance(expert, seed_tensor)
    # Marks and what they keep take over the memory.
    return importance.ge_(_threshold(importance.reshape(-1), spread)).mul_(expert)


def _importance(expert: Tensor, seed_tensor: Tensor) -> Tensor:
    width = seed_tensor.shape[-1] if seed_tensor.dim() else 1
    changes, seeds = expert.reshape(-1, width), seed_tensor.reshape(-1, width)
    importance = torch.empty_like(seeds)
    for rows in in_blocks(len(seeds), max(1, _BLOCK // width)):
        before = torch.softmax(seeds[rows], dim=-1).add_(_LEAST)
        after = torch.softmax(seeds[rows] + changes[rows], dim=-1).add_(_LEAST)
        divergence = after.mul(after.div(before).log_()).sum(dim=-1, keepdim=True)
        torch.mul(changes[rows].abs(), divergence, out=importance[rows])
    return importance.reshape(seed_tensor.shape)


def _threshold(importance: Tensor, spread: float) -> Tensor:
    first, median, third = (smallest(importance, (len(importance) - 1) * q // 4 + 1) for q in (1, 2, 3))
    return median + spread * (third - first)


METHOD = Method(
    name="arcee_fusion",
    function=arcee_fusion,
    parameters=(
        Parameter("spread", default=1.5, low=0.0, high=4.0),
        Parameter("scale", default=1.0, low=0.1, high=3.0, log=True, screened=False),
    ),
    paper=Paper("Arcee AI", 2024, None),
    summary="the changes of an expert whose importance stands out, added",
    needs_seed=True,
)
