"""The Karcher mean and multi-SLERP: the mean direction of the task vectors on the sphere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import (
    MERGEKIT,
    NORMALIZE,
    PAPER,
    READING,
    Method,
    Paper,
    Parameter,
)
from selfdev.algorithms.library.sphere import combination, gram, karcher_mean
from selfdev.errors import UserError

# Enough for float32: near the mean every step shrinks the error many times over.
_STEPS = 20

# What mergekit takes: steps, the length below which a tensor has no direction and a step is not worth taking,
# and multi-SLERP's bound for a sum without direction.
_MERGEKITS_STEPS = 10
_NO_DIRECTION = 1e-5
_NO_SUM = 1e-8


def karcher(
    task_vectors: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    scale: float = 1.0,
    reading: str = PAPER,
) -> Tensor:
    """Average the directions on the sphere and the norms on the line (Karcher 1977).

    The mean direction has the smallest sum of squared angles to all task vectors; it is found by steps along
    the sphere. A zero task vector has no direction and is left out. Directions that cancel each other give
    zero.

    mergekit averages the weights themselves, seed plus task vector, and not the task vectors. It takes 10
    steps, or stops where one is shorter than 1e-5, counts the norm of a zero tensor in the mean norm, and
    starts at the first direction where they cancel. `reading="mergekit"` gives all that and needs the seed's
    tensor.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter); in mergekit's reading alone.
        scale: factor on the merged task vector.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if reading != MERGEKIT:
        weights = task_vectors.new_ones(len(task_vectors))
        return _spherical_mean(task_vectors, weights, _STEPS).mul_(scale)
    if seed_tensor is None:
        raise UserError(
            "mergekit averages the weights: its reading of 'karcher' needs the seed's tensor; pass it"
        )
    if len(task_vectors) == 1:
        return scale * task_vectors[0]
    products = gram(task_vectors, seed_tensor)
    norms = products.diagonal().sqrt()
    counted = (norms > _NO_DIRECTION).double()
    if not counted.any():
        return -scale * seed_tensor
    cosines = products / torch.outer(norms, norms).clamp(min=_NO_DIRECTION**2)
    shares = counted / counted.sum()
    start = None
    if (shares @ cosines @ shares).clamp(min=0.0).sqrt() < _NO_DIRECTION:
        start = torch.zeros_like(shares)
        start[counted.argmax()] = 1.0
    mean = karcher_mean(cosines, shares, _MERGEKITS_STEPS, start=start, enough=_NO_DIRECTION)
    factors = norms.mean() * mean / norms.clamp(min=_NO_DIRECTION)
    return combination(factors, task_vectors, seed_tensor).mul_(scale)


def multislerp(
    task_vectors: Tensor,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    scale: float = 1.0,
    reading: str = PAPER,
) -> Tensor:
    """Average the directions by one step on the sphere (Goddard 2025, mergekit's multi-SLERP).

    The Karcher mean after a single step from the normalised mean, with a weight for each expert; norms are
    averaged with the same weights.

    mergekit's step goes along the projections on the tangent space, not along the great circles; and those of
    the directions sum to zero at their own mean, so that it stays there: the merged direction is that of the
    weighted sum of the directions. It takes negative weights too, and counts a zero task vector in the mean
    norm. `reading="mergekit"` gives all that. One expert is returned as it is.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        weights: one for each expert, brought to sum 1, which must not be 0; not negative in the first
            reading. Equal if None.
        normalize: False leaves the weights as they are, in mergekit's reading alone, where it is `normalize_weights`.
        scale: factor on the merged task vector.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).

    Raises:
        UserError: the directions of three or more experts cancel in mergekit's reading, as there.
    """
    factors = (
        task_vectors.new_ones(len(task_vectors)) if weights is None else task_vectors.new_tensor(weights)
    )
    if reading != MERGEKIT:
        if normalize is False:
            raise UserError("shares of a mean sum to 1 in the paper's reading; leave normalize=False out")
        return _spherical_mean(task_vectors, factors, steps=1).mul_(scale)
    if len(task_vectors) == 1:
        return scale * task_vectors[0]
    products = gram(task_vectors)
    norms = products.diagonal().sqrt()
    shares = (factors if normalize is False else factors / factors.sum()).double()
    mean = shares / (norms + _NO_SUM)
    length = (mean @ products @ mean).clamp(min=0.0).sqrt()
    if length >= _NO_SUM:
        return combination((shares @ norms) * mean / length, task_vectors).mul_(scale)
    if len(task_vectors) == 2:
        return combination(shares, task_vectors).mul_(scale)
    raise UserError("the weighted directions of the experts cancel each other; change the weights")


def _spherical_mean(task_vectors: Tensor, weights: Tensor, steps: int) -> Tensor:
    products = gram(task_vectors)
    norms = products.diagonal().sqrt()
    counted = weights.double().clamp(min=0.0) * (norms > 0)
    if not counted.any():
        return torch.zeros_like(task_vectors[0])
    lengths = torch.where(norms > 0, norms, 1.0)
    shares = counted / counted.sum()
    mean = karcher_mean(products / torch.outer(lengths, lengths), shares, steps)
    return combination((shares @ norms) * mean / lengths, task_vectors)


METHOD = Method(
    name="karcher",
    function=karcher,
    parameters=(Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False), READING),
    paper=Paper("Karcher", 1977, None),
    summary="the mean direction on the sphere, at the mean norm",
    needs_seed_with=("reading", MERGEKIT),
)

MULTISLERP_METHOD = Method(
    name="multislerp",
    function=multislerp,
    parameters=(
        Parameter("weights", default=None, low=0.0, high=1.5, per_expert=True),
        NORMALIZE,
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        READING,
    ),
    paper=Paper("Goddard", 2025, None),
    summary="the weighted mean direction by one step on the sphere",
)
