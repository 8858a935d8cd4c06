"""KnOTS: align the experts by one joint SVD, then merge as TIES does."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import of_gram
from selfdev.algorithms.library.ties import ties

# Rows or columns of an expert that are multiplied at a time.
_BLOCK = 1 << 10


def knots(task_vectors: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Merge the right factors of a joint SVD by TIES (Stoica et al. 2024, arXiv 2410.19735).

    The matrices side by side are U S [V_1 ... V_n]; the parts V_i are merged by TIES, and the result is U S
    V. Tensors that are no matrices are merged by TIES as they are.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries of each V_i kept, by magnitude; in (0, 1].
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if task_vectors.dim() != 3:
        return ties(task_vectors, density=density, scale=scale)
    experts, rows, columns = task_vectors.shape
    # The vectors of the shorter side will do: U S is the joint matrix times V, and S V^T is U^T times it.
    tall = rows > experts * columns
    vectors, values = of_gram(_tall_gram(task_vectors) if tall else _wide_gram(task_vectors))
    if len(values) == 0:
        return torch.zeros_like(task_vectors[0])
    if not tall:
        parts = (vectors / values).T @ task_vectors
        return (vectors * values) @ ties(parts, density=density, scale=scale)
    right = vectors.view(experts, columns, -1)
    merged = ties(right.mT, density=density, scale=scale)
    result = torch.zeros_like(task_vectors[0])
    for vector, part in zip(task_vectors, right, strict=True):
        result.addmm_(vector, part @ merged)
    return result


def _tall_gram(task_vectors: Tensor) -> Tensor:
    """J^T J of the joint matrix J, in float64."""
    experts, _, columns = task_vectors.shape
    gram = task_vectors.new_zeros(experts * columns, experts * columns, dtype=torch.float64)
    for block in task_vectors.split(_BLOCK, dim=1):
        rows = block.double().permute(1, 0, 2).flatten(1)
        gram.addmm_(rows.T, rows)
    return gram


def _wide_gram(task_vectors: Tensor) -> Tensor:
    """J J^T of the joint matrix J, in float64."""
    rows = task_vectors.shape[1]
    gram = task_vectors.new_zeros(rows, rows, dtype=torch.float64)
    for vector in task_vectors:
        for block in vector.split(_BLOCK, dim=1):
            columns = block.double()
            gram.addmm_(columns, columns.T)
    return gram


METHOD = Method(
    name="knots",
    function=knots,
    parameters=(
        Parameter("density", default=0.2, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Stoica et al.", 2024, "2410.19735"),
    summary="TIES in the common basis of a joint SVD",
)
