"""Multi-SLERP: the weighted mean direction of the task vectors by one step on the sphere."""

from collections.abc import Sequence

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
from selfdev.algorithms.library.sphere import combination, gram, spherical_mean
from selfdev.errors import UserError

# mergekit's bound for a sum without direction.
_NO_SUM = 1e-8

# From where directions are measured.
_SEED, _ZERO = "seed", "zero"


def multislerp(
    task_vectors: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    scale: float = 1.0,
    origin: str = _SEED,
    reading: str = PAPER,
) -> Tensor:
    """Average the directions by one step on the sphere (Goddard 2025, mergekit's multi-SLERP; no paper).

    The Karcher mean after a single step from the normalised mean, with a weight for each expert; norms are
    averaged with the same weights.

    mergekit's step goes along the projections on the tangent space, not along the great circles; and those of
    the directions sum to zero at their own mean, so that it stays there: the merged direction is that of the
    weighted sum of the directions. It takes negative weights too, and counts a zero task vector in the mean
    norm. `reading="mergekit"` gives all that. One expert is returned as it is. Without a base model mergekit merges
    the weights themselves, seed plus task vector, as `origin="zero"` does.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter), float32; with `origin="zero"` alone.
        weights: one for each expert, brought to sum 1: at least 0, or any numbers whose sum is not 0 in mergekit's
            reading. Equal if None.
        normalize: None, as True, brings the weights to sum 1; False leaves them as they are, in mergekit's reading
            alone, where it is `normalize_weights`.
        scale: factor on the merged task vector; any number.
        origin: from where directions are measured: `seed`, those of the task vectors, or `zero`, those of the weights.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).

    Raises:
        UserError: a weight out of its range; or the directions of three or more experts cancel in mergekit's reading,
            as there.
    """
    if origin == _SEED:
        seed_tensor = None
    factors = (
        task_vectors.new_ones(len(task_vectors)) if weights is None else task_vectors.new_tensor(weights)
    )
    if reading != MERGEKIT:
        if normalize is False:
            raise UserError("shares of a mean sum to 1 in the paper's reading; leave normalize=False out")
        if (factors < 0).any():
            raise UserError(f"weights {weights}: shares of a mean are at least 0; or choose reading=mergekit")
        return spherical_mean(task_vectors, factors, steps=1, origin=seed_tensor).mul_(scale)
    if len(task_vectors) == 1:
        return scale * task_vectors[0]
    if normalize is not False and factors.sum().abs() < _NO_SUM:
        raise UserError(f"weights {weights} sum to 0, and cannot be brought to 1; choose others")
    products = gram(task_vectors, seed_tensor)
    norms = products.diagonal().sqrt()
    shares = (factors if normalize is False else factors / factors.sum()).double()
    mean = shares / (norms + _NO_SUM)
    length = (mean @ products @ mean).clamp(min=0.0).sqrt()
    if length >= _NO_SUM:
        return combination((shares @ norms) * mean / length, task_vectors, seed_tensor).mul_(scale)
    if len(task_vectors) == 2:
        return combination(shares, task_vectors, seed_tensor).mul_(scale)
    raise UserError("the weighted directions of the experts cancel each other; change the weights")


METHOD = Method(
    name="multislerp",
    function=multislerp,
    parameters=(
        Parameter("weights", default=None, low=0.0, high=1.5, per_expert=True),
        NORMALIZE,
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        Parameter("origin", default=_SEED, choices=(_SEED, _ZERO)),
        READING,
    ),
    paper=Paper("Goddard", 2025, None),
    summary="the weighted mean direction by one step on the sphere",
    needs_seed_with=("origin", _ZERO),
)
