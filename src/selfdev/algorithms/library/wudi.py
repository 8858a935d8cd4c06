"""WUDI: the merged matrix that interferes least with every expert's input directions."""

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import in_blocks
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import each_matrix, eigen
from selfdev.errors import UserError

# Entries that are merged at a time, in whole rows.
_BLOCK = 1 << 18


@each_matrix
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
    norms = torch.stack([vector.norm() for vector in task_vectors])
    shares = torch.where(norms > 0, 1.0 / norms, 0.0)
    experts, rows, columns = task_vectors.shape
    inside = _by_rows if experts * rows < columns else _by_columns
    return inside(task_vectors, shares, total, max(cutoff, 1e-6)).mul_(scale)


def _by_columns(task_vectors: Tensor, shares: Tensor, total: Tensor, cutoff: float) -> Tensor:
    """By the eigenvectors of A, which is of the size of a matrix's rows."""
    weighed = total.new_zeros(total.shape[1], total.shape[1])
    for vector, share in zip(task_vectors, shares.square().tolist(), strict=True):
        weighed.addmm_(vector.T, vector, alpha=share)
    values, vectors = _solved(weighed, cutoff)
    del weighed
    gap = torch.zeros_like(total)
    wide = len(total) < total.shape[1]
    spans = list(in_blocks(len(total), max(1, _BLOCK // max(1, total.shape[1]))))
    for vector, share in zip(task_vectors, shares.square().tolist(), strict=True):
        own = None if wide else vector.T @ vector
        for rows in spans:
            apart = vector[rows] - total[rows]
            first, second = (apart @ vector.T, vector) if own is None else (apart, own)
            gap[rows].addmm_(first, second, alpha=share)
    for rows in spans:
        total[rows] += (gap[rows] @ vectors / values) @ vectors.T
    return total


def _by_rows(task_vectors: Tensor, shares: Tensor, total: Tensor, cutoff: float) -> Tensor:
    """The same by the rows of all experts, where these are fewer.

    With B the rows of all D_i / |D_i|, A is B^T B, and B B^T = U L U^T has its eigenvalues: A^+ is B^T U L^-2 U^T B.
    So M is S plus the sum of (D_i - S) D_i^T / |D_i| U_i, times L^-1 U^T B, where U_i are the rows of U that belong
    to D_i.
    """
    experts, rows, _ = task_vectors.shape
    stacked = task_vectors.flatten(0, 1)
    products = (stacked @ stacked.T).view(experts, rows, experts, rows)
    apart = [
        share * (products[i, :, i] - products[:, :, i].sum(dim=0)) for i, share in enumerate(shares.tolist())
    ]
    products *= shares.view(-1, 1, 1, 1)
    products *= shares.view(1, 1, -1, 1)
    values, vectors = _solved(products.view(experts * rows, experts * rows), cutoff)
    del products
    inside = sum((part @ own for part, own in zip(apart, vectors.split(rows), strict=True)), torch.zeros(()))
    back = (inside / values) @ vectors.T
    for vector, share, factor in zip(task_vectors, shares.tolist(), back.split(rows, dim=1), strict=True):
        total.addmm_(factor, vector, alpha=share)
    return total


def _solved(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues above the cutoff, and their vectors; the matrix is overwritten."""
    values, vectors = eigen(matrix)
    # Zero experts give a zero matrix, whose largest eigenvalue is 0: nothing passes, and the sum stays.
    solved = (values > cutoff * values[-1:]) & (values > 0)
    return values[solved], vectors[:, solved]


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
