"""The Karcher mean and multi-SLERP: the mean direction of the task vectors on the sphere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.sphere import karcher_mean

# Enough for float32: near the mean every step shrinks the error many times over.
_STEPS = 20


def karcher(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Average the directions on the sphere and the norms on the line (Karcher 1977).

    The mean direction has the smallest sum of squared angles to all task vectors; it is found by steps along
    the sphere. A zero task vector has no direction and is left out. Directions that cancel each other give
    zero.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    weights = task_vectors.new_ones(len(task_vectors))
    return scale * _spherical_mean(task_vectors, weights, _STEPS)


def multislerp(task_vectors: Tensor, *, weights: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """Average the directions by one step on the sphere (Goddard 2025, mergekit's multi-SLERP).

    The Karcher mean after a single step from the normalised mean, with a weight for each expert; norms are
    averaged with the same weights.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        weights: one for each expert, not negative; brought to sum 1. Equal if None.
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    factors = (
        task_vectors.new_ones(len(task_vectors)) if weights is None else task_vectors.new_tensor(weights)
    )
    return scale * _spherical_mean(task_vectors, factors, steps=1)


def _spherical_mean(task_vectors: Tensor, weights: Tensor, steps: int) -> Tensor:
    flat = task_vectors.reshape(len(task_vectors), -1)
    norms = flat.norm(dim=1)
    counted = (norms > 0) & (weights > 0)
    if not counted.any():
        return torch.zeros_like(task_vectors[0])
    norms, shares = norms[counted], weights[counted] / weights[counted].sum()
    direction = karcher_mean(flat[counted] / norms[:, None], shares, steps)
    merged: Tensor = (shares @ norms) * direction
    return merged.reshape(task_vectors.shape[1:])


METHOD = Method(
    name="karcher",
    function=karcher,
    parameters=(Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),),
    paper=Paper("Karcher", 1977, None),
    summary="the mean direction on the sphere, at the mean norm",
)

MULTISLERP_METHOD = Method(
    name="multislerp",
    function=multislerp,
    parameters=(
        Parameter("weights", default=None, low=0.0, high=1.5, per_expert=True),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Goddard", 2025, None),
    summary="the weighted mean direction by one step on the sphere",
)
