"""DELLA: drop at random, small entries more often, then merge as TIES does."""

import torch
from torch import Tensor

from selfdev.algorithms.library.sign_election import disjoint_mean
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import check_density, keep_randomly

# A keep probability near zero would scale a surviving entry without bound.
_RAREST = 0.01


def della(
    task_vectors: Tensor, *, density: float = 0.5, epsilon: float = 0.2, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Drop small entries more often than large ones, then merge as TIES (Deep et al. 2024, arXiv 2406.11617).

    The entry with rank r by magnitude in its row (0 the largest, n entries in a row) is kept with
    probability density + epsilon / 2 - epsilon r / n, limited to [0.01, 1], and divided by it. Then as TIES
    without trimming.

    Args:
        task_vectors: shape (experts, *parameter), float32; the last dimension is the row.
        density: mean probability with which an entry is kept, in (0, 1].
        epsilon: difference of the probabilities between the largest and the smallest entry of a row.
        scale: factor on the merged task vector.
        seed: of the drawing; give each tensor of a model a seed of its own.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    rows = task_vectors.reshape(len(task_vectors), -1) if task_vectors.dim() < 2 else task_vectors
    ranks = rows.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    probability = density + epsilon / 2 - epsilon * ranks.to(torch.float32) / rows.shape[-1]
    kept = keep_randomly(rows, probability.clamp(_RAREST, 1.0), seed)
    return scale * disjoint_mean(kept.reshape(task_vectors.shape))


METHOD = Method(
    name="della",
    function=della,
    parameters=(
        Parameter("density", default=0.5, low=0.1, high=0.95),
        Parameter("epsilon", default=0.2, low=0.0, high=0.4),
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        Parameter("seed", default=0, low=0, high=2**31 - 1, integer=True, screened=False),
    ),
    paper=Paper("Deep et al.", 2024, "2406.11617"),
    summary="drop entries at random, small ones more often, merge as TIES does",
)
