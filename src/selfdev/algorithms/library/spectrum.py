"""Singular value decompositions in little memory, without directions that carry nothing.

They are taken from a matrix's product with its own transpose, on its shorter side, in float64. That needs a few
matrices of the shorter side alone, where LAPACK's own decomposition works in several copies of the whole, and loses
nothing: the product's eigenvalues are squares, those of directions that count at least 1e-10 of the largest, its
rounding is 1e-16.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding: their vectors are arbitrary in float32, and a
# method that gives them weight would return noise that depends on the linear algebra library.
_NOTHING = 1e-5

# Rows or columns that are multiplied in float64 at a time.
_BLOCK = 1 << 8

# From this side on a matrix and its eigenvectors count in gigabytes, and memory goes before all else.
_LARGE = 1 << 14

# The shorter side of a matrix in a stack, at least: what is smaller is the kernel of a convolution.
_SIDE = 16


def each_matrix(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a method of matrices merge a tensor that is a stack of them, one by one.

    A mixture of experts stores the matrices of all its experts in one tensor, shape (experts, rows, columns).
    """

    @functools.wraps(merge)
    def merged(task_vectors: Tensor, **parameters: object) -> Tensor:
        if task_vectors.dim() != 4 or min(task_vectors.shape[2:]) < _SIDE:
            return merge(task_vectors, **parameters)
        out = torch.empty_like(task_vectors[0])
        for place, matrix in enumerate(out):
            matrix.copy_(merge(task_vectors[:, place], **parameters))
        return out

    return merged


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
    tall = len(matrix) > matrix.shape[1]
    wide = matrix.mT if tall else matrix
    vectors, values = of_gram(gram([wide]), rank, beside=beside)
    long = matrix.new_empty(wide.shape[1], len(values))
    for block, out in zip(wide.split(_BLOCK, dim=1), long.split(_BLOCK), strict=True):
        out.copy_(block.double().mT @ vectors / values)
    short = vectors.float()
    return (long, values.float(), short) if tall else (short, values.float(), long)


def largest_value(matrix: Tensor) -> float:
    """The largest singular value of a matrix; 0 of an empty one."""
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    return float(of_gram(gram([wide]), 1)[1].sum())


def gram(beside: Sequence[Tensor]) -> Tensor:
    """Return J J^T in float64, where J are the matrices, shape (rows, columns), side by side."""
    product = beside[0].new_zeros(len(beside[0]), len(beside[0]), dtype=torch.float64)
    for matrix in beside:
        for block in matrix.split(_BLOCK, dim=1):
            columns = block.double()
            product.addmm_(columns, columns.mT)
    return product


def of_gram(product: Tensor, rank: int | None = None, *, beside: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return what a float32 matrix's product with its own transpose tells of it, without empty directions.

    Args:
        product: X^T X or X X^T, float64; its memory may be overwritten.
        rank: how many directions to keep; all if None.
        beside: as in `components`.

    Returns:
        The right vectors of X in the first case, the left ones in the second, as columns (n, k), and singular values
        (k,), both float64, in falling order; k can be 0.
    """
    squares, vectors = eigen(product.neg_(), rank)  # the largest first
    values = squares.neg_().clamp_(min=0.0).sqrt_()
    kept = int((values > _NOTHING * max([beside, *values[:1].tolist()])).sum())
    return vectors[:, :kept], values[:kept]


def eigen(matrix: Tensor, least: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix in rising order, and their vectors as columns.

    Args:
        matrix: shape (n, n). On a CPU it is overwritten: a copy would take as much as all that is found.
        least: how many to return; all if None.
    """
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values[:least], vectors[:, :least]
    # In place, since the matrix is its own transpose and LAPACK wants that order. torch's driver works in two matrices
    # more, SciPy's in one, but holds the interpreter's lock: tensors merged side by side would wait for each other.
    if len(matrix) >= _LARGE:
        from scipy.linalg import eigh  # a tenth of the time that a merge takes to start

        found = eigh(
            matrix.mT.numpy(),
            overwrite_a=True,
            check_finite=False,
            driver="evr",
            subset_by_index=None if least is None else (0, min(max(least, 1), len(matrix)) - 1),
        )
        squares, columns = map(torch.from_numpy, found)
        return squares[:least], columns[:, :least]
    values = matrix.new_empty(len(matrix))
    torch.linalg.eigh(matrix.mT, out=(values, matrix.mT))
    return values[:least], matrix.mT[:, :least]


def orthogonal(columns: list[Tensor]) -> Tensor:
    """Return the matrix with orthonormal columns nearest to some columns (their polar factor, same shape).

    Where the columns are linearly dependent no such matrix exists; the polar factor on their span is
    returned.

    Args:
        columns: side by side, each of shape (rows, columns). The list is emptied: they are not kept in memory twice.
    """
    beside = torch.cat(columns, dim=1)
    columns.clear()
    left, _, right = components(beside)
    return left @ right.T
