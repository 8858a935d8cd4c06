"""SCE: select by variance, calculate weights, erase minorities."""

import torch
from torch import Tensor

from selfdev.algorithms.library.sign_election import disjoint_mean
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import largest


def sce(task_vectors: Tensor, *, density: float = 0.1, scale: float = 1.0) -> Tensor:
    """Select entries by variance, weight by energy, erase minority signs (Wan et al. 2024, arXiv 2408.07990).

    Kept are the `density` share of entries with the largest variance over the experts. An expert's weight is
    its share of the sum of squares of what is kept (equal weights if nothing is left). Values against the
    elected sign are erased, and the weights of the rest are brought to sum 1 at each entry.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries kept, in (0, 1]; the paper uses 0.1.
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    variance = task_vectors.var(dim=0, correction=0)
    selected = task_vectors * largest(variance[None], density)[0]
    energy = selected.square().reshape(len(selected), -1).sum(dim=1)
    energy = torch.where(energy.sum() > 0, energy, 1.0)
    weights = (energy / energy.sum()).reshape(-1, *[1] * (selected.dim() - 1))
    return scale * disjoint_mean(selected, weights)


METHOD = Method(
    name="sce",
    function=sce,
    parameters=(
        Parameter("density", default=0.1, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Wan et al.", 2024, "2408.07990"),
    summary="entries of high variance, weighted by energy, without minority signs",
)
