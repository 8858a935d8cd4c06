"""KnOTS: align the experts by one joint SVD, then merge as TIES does."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import each_matrix, gram, of_gram
from selfdev.algorithms.library.ties import ties

# Rows of the experts that are multiplied at a time.
_BLOCK = 1 << 8


@each_matrix
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
    vectors, values = of_gram(_joint_gram(task_vectors) if tall else gram(list(task_vectors)))
    vectors, values = vectors.float(), values.float()
    if len(values) == 0:
        return torch.zeros_like(task_vectors[0])
    if not tall:
        vectors /= values
        merged = ties(vectors.T @ task_vectors, density=density, scale=scale)
        return vectors.mul_(values.square()) @ merged
    right = vectors.view(experts, columns, -1)
    merged = ties(right.mT, density=density, scale=scale)
    result = torch.zeros_like(task_vectors[0])
    for vector, part in zip(task_vectors, right, strict=True):
        result.addmm_(vector, part @ merged)
    return result


def _joint_gram(task_vectors: Tensor) -> Tensor:
    """J^T J of the joint matrix J, in float64."""
    experts, _, columns = task_vectors.shape
    product = task_vectors.new_zeros(experts * columns, experts * columns, dtype=torch.float64)
    for block in task_vectors.split(_BLOCK, dim=1):
        rows = block.double().permute(1, 0, 2).flatten(1)
        product.addmm_(rows.T, rows)
    return product


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
