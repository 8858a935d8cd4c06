"""WUDI: the merged matrix that interferes least with every expert's input directions."""

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import in_blocks
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.errors import UserError

# Entries that are merged at a time, in whole rows.
_BLOCK = 1 << 18


def wudi(task_vectors: Tensor, *, cutoff: float = 0.01, scale: float = 1.0) -> Tensor:
    """Minimise the interference on the experts' row spaces (Cheng et al. 2025, arXiv 2503.08099).

    The loss of a merged matrix M is the sum over experts i of |(M - D_i) D_i^T|^2 / |D_i|^2 (Frobenius
    norms). The paper takes 300 steps of Adam from the sum S on. The loss is quadratic, and this is the limit
    of plain gradient descent: with G_i = D_i^T D_i / |D_i|^2 and A the sum of the G_i, M = S + sum of (D_i -
    S) G_i A^+. `cutoff` stands for stopping early: in the directions in which A has less than that share of
    its largest eigenvalue the sum stays as it is. Tensors that are no matrices are added.

    Args:
        task_vectors: shape (experts, *parameter), float32; a matrix is (outputs, inputs).
        cutoff: relative eigenvalue up to which nothing is changed, in [0, 1); below 1e-6 it counts as 1e-6.
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not 0.0 <= cutoff < 1.0:
        raise UserError(f"cutoff {cutoff}: it is a share of the largest eigenvalue; give a number in [0, 1)")
    total = task_vectors.sum(dim=0)
    if task_vectors.dim() != 3:
        return total.mul_(scale)
    grams = task_vectors.mT @ task_vectors
    powers = grams.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    grams /= torch.where(powers > 0, powers, 1.0)
    values, vectors = torch.linalg.eigh(grams.sum(dim=0))
    # Zero experts give a zero matrix, whose largest eigenvalue is 0: nothing passes, and the sum stays.
    solved = (values > max(cutoff, 1e-6) * values[-1].clamp(min=0.0)) & (values > 0)
    vectors, values = vectors[:, solved], values[solved]
    for rows in in_blocks(len(total), max(1, _BLOCK // max(1, total.shape[1]))):
        gap = ((task_vectors[:, rows] - total[rows]) @ grams).sum(dim=0)
        total[rows] += (gap @ vectors / values) @ vectors.T
    return total.mul_(scale)


METHOD = Method(
    name="wudi",
    function=wudi,
    parameters=(
        Parameter("cutoff", default=0.01, low=1e-4, high=0.5, log=True),
        Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),
    ),
    paper=Paper("Cheng et al.", 2025, "2503.08099"),
    summary="the matrix that interferes least with every expert's inputs",
)
