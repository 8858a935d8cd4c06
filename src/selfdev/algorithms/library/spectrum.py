"""Singular value decompositions without directions that carry nothing."""

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding: their vectors are arbitrary in float32, and a
# method that gives them weight would return noise that depends on the linear algebra library.
_NOTHING = 1e-5


def components(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the strongest singular components of a matrix, at most `rank`, without empty ones.

    Args:
        matrix: shape (rows, columns).
        rank: how many to keep; all if None.

    Returns:
        Left vectors (rows, k), singular values (k,) in falling order, right vectors (columns, k); k can be 0.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > _NOTHING * values[0]).sum()) if len(values) else 0
    kept = kept if rank is None else min(kept, rank)
    return left[:, :kept], values[:kept], right[:kept].T


def orthogonal(columns: Tensor) -> Tensor:
    """Return the matrix with orthonormal columns nearest to `columns` (its polar factor, same shape).

    Where the columns are linearly dependent no such matrix exists; the polar factor on their span is
    returned.
    """
    left, _, right = components(columns)
    return left @ right.T
