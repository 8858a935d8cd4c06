"""The Karcher mean: the mean direction of the task vectors on the sphere."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import combination, gram, karcher_mean, spherical_mean
from selfdev.errors import UserError

# Enough for float32: near the mean every step shrinks the error many times over.
_STEPS = 20
_ENOUGH = 1e-6

# What mergekit takes: steps, and the length below which a tensor has no direction and a step is not worth taking.
_MERGEKITS_STEPS = 10
_NO_DIRECTION = 1e-5


def karcher(
    task_vectors: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    scale: float = 1.0,
    steps: int | None = None,
    tolerance: float | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Average the directions on the sphere and the norms on the line (Karcher 1977, not on arXiv).

    The mean direction has the smallest sum of squared angles to all task vectors; it is found by steps along
    the sphere. A zero task vector has no direction and is left out. Directions that cancel each other give
    zero.

    mergekit (which cites arXiv 2603.04972) averages the weights themselves, seed plus task vector, and
    not the task vectors. It takes 10 steps, or stops where one is shorter than 1e-5, counts the norm of a zero tensor
    in the mean norm, and starts at the first direction where they cancel; what is shorter than its tolerance is zero
    there. `reading="mergekit"` gives all that and needs the seed's tensor.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter), float32; in mergekit's reading alone.
        scale: factor on the merged task vector; any number.
        steps: the most that are taken along the sphere, at least 0: mergekit's `max_iter`. By default 20, in mergekit's
            reading 10.
        tolerance: radians, above 0; a shorter step is not taken any more: mergekit's `tol`. By default 1e-6, in
            mergekit's reading 1e-5.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).

    Raises:
        UserError: steps or tolerance out of their range.
    """
    most, enough = (_MERGEKITS_STEPS, _NO_DIRECTION) if reading == MERGEKIT else (_STEPS, _ENOUGH)
    most, enough = most if steps is None else steps, enough if tolerance is None else tolerance
    if most < 0 or not enough > 0:
        raise UserError(
            f"karcher takes steps of at least 0 and a tolerance above 0, not {most} and {enough:g}"
        )
    if reading != MERGEKIT:
        weights = task_vectors.new_ones(len(task_vectors))
        return spherical_mean(task_vectors, weights, most, enough).mul_(scale)
    if seed_tensor is None:
        raise UserError(
            "mergekit averages the weights: its reading of 'karcher' needs the seed's tensor; pass it"
        )
    if len(task_vectors) == 1:
        return scale * task_vectors[0]
    products = gram(task_vectors, seed_tensor)
    norms = products.diagonal().sqrt()
    counted = (norms > enough).double()
    if not counted.any():
        return -scale * seed_tensor
    cosines = products / torch.outer(norms, norms).clamp(min=enough**2)
    shares = counted / counted.sum()
    start = None
    if (shares @ cosines @ shares).clamp(min=0.0).sqrt() < enough:
        start = torch.zeros_like(shares)
        start[counted.argmax()] = 1.0
    mean = karcher_mean(cosines, shares, most, start=start, enough=enough)
    factors = norms.mean() * mean / norms.clamp(min=enough)
    return combination(factors, task_vectors, seed_tensor).mul_(scale)


METHOD = Method(
    name="karcher",
    function=karcher,
    parameters=(
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        Parameter("steps", default=None, integer=True),
        Parameter("tolerance", default=None),
        READING,
    ),
    paper=Paper("Karcher", 1977, None),
    summary="the mean direction on the sphere, at the mean norm",
    needs_seed_with=("reading", MERGEKIT),
)
