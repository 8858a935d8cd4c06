"""One sign for each entry, elected by the experts, and the mean of those that agree with it."""

import torch
from torch import Tensor


def elected_sign(task_vectors: Tensor) -> Tensor:
    """Return the sign of the sum over experts, shape (*parameter): -1, 0 or 1."""
    return torch.sign(task_vectors.sum(dim=0))


def disjoint_mean(task_vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average at each entry the non-zero values that have the elected sign.

    An entry whose sum is exactly zero has no elected sign, and becomes zero.

    Args:
        task_vectors: shape (experts, *parameter).
        weights: of the average, broadcastable to the task vectors; equal if None.

    Returns:
        Shape (*parameter).
    """
    agrees = (task_vectors * elected_sign(task_vectors) > 0).to(task_vectors.dtype)
    weighted = agrees if weights is None else agrees * weights
    total = weighted.sum(dim=0)
    return (task_vectors * weighted).sum(dim=0) / torch.where(total > 0, total, 1.0)
