"""Singular value decompositions without directions that carry nothing."""

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding: their vectors are arbitrary in float32, and a
# method that gives them weight would return noise that depends on the linear algebra library.
_NOTHING = 1e-5


def components(
    matrix: Tensor, rank: int | None = None, *, beside: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the strongest singular components of a matrix, at most `rank`, without empty ones.

    Args:
        matrix: shape (rows, columns).
        rank: how many to keep; all if None.
        beside: singular value of what the matrix was computed from, beside which its own may be rounding.

    Returns:
        Left vectors (rows, k), singular values (k,) in falling order, right vectors (columns, k); k can be 0.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > _NOTHING * max(values[0].item(), beside)).sum()) if len(values) else 0
    kept = kept if rank is None else min(kept, rank)
    if kept < len(values):  # what is left out does not stay in memory behind a view
        left, right = left[:, :kept].clone(), right[:kept].clone()
    return left, values[:kept], right.T


def largest_value(matrix: Tensor) -> float:
    """The largest singular value of a matrix, from the smaller of its products with itself."""
    gram = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt()) if len(gram) else 0.0


def of_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a float32 matrix's product with its own transpose tells of it, without empty directions.

    The product needs no copy of the matrix, as a singular value decomposition does, and in float64 it loses nothing:
    its eigenvalues are squares, those of directions that count at least 1e-10 of the largest, its rounding is 1e-16.

    Args:
        gram: X^T X or X X^T, float64.

    Returns:
        The right vectors of X in the first case, the left ones in the second, as columns (n, k), and singular values
        (k,), both float32, in falling order; k can be 0.
    """
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp_(min=0.0).sqrt_().flip(0)
    kept = int((values > _NOTHING * values[0]).sum()) if len(values) else 0
    return vectors[:, len(values) - kept :].float().flip(1), values[:kept].float()


def orthogonal(columns: Tensor) -> Tensor:
    """Return the matrix with orthonormal columns nearest to `columns` (its polar factor, same shape).

    Where the columns are linearly dependent no such matrix exists; the polar factor on their span is
    returned.
    """
    left, _, right = components(columns)
    return left @ right.T
