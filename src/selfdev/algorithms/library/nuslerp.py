"""NuSLERP: along the great circle between two task vectors."""

from torch import Tensor

from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import check_two, combination, gram, gram_by_row, slerp


def nuslerp(
    task_vectors: Tensor,
    *,
    t: float = 0.5,
    scale: float = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
    reading: str = PAPER,
) -> Tensor:
    """Interpolate two task vectors along a great circle (Shoemake 1985, not on arXiv).

    The formula of `slerp`, with task vectors in place of weights: what mergekit calls NuSLERP with a base model,
    whose two weights give t = second / (first + second). A zero task vector has no direction: here it is
    interpolated linearly, while mergekit takes it to be at a right angle, which `reading="mergekit"` does too.

    Args:
        task_vectors: shape (2, *parameter), float32.
        t: how far to go from the first expert (0) to the second (1); any number, beyond them too, as in mergekit.
        scale: factor on the merged task vector; any number.
        flatten: whether a task vector is one direction; else it is many, along its last dimension: mergekit's
            `nuslerp_flatten`.
        row_wise: whether the directions of a tensor that is not flattened lie along its first dimension: mergekit's
            `nuslerp_row_wise`.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_two(task_vectors)
    orthogonal = reading == MERGEKIT
    if flatten or task_vectors.dim() == 1:  # a number has no rows
        factors = slerp(gram(task_vectors), t, zero_is_orthogonal=orthogonal)
        return combination(scale * factors, task_vectors)
    directions = task_vectors.transpose(1, -1) if row_wise else task_vectors
    factors = slerp(gram_by_row(directions), t, zero_is_orthogonal=orthogonal)
    merged = (directions * factors[..., None].to(directions.dtype)).sum(dim=0).mul_(scale)
    return merged.transpose(0, -1).contiguous() if row_wise else merged


METHOD = Method(
    name="nuslerp",
    function=nuslerp,
    parameters=(
        Parameter("t", default=0.5, low=0.0, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=3.0, log=True, screened=False),
        Parameter("flatten", default=True, choices=(True, False)),
        Parameter("row_wise", default=False, choices=(True, False)),
        READING,
    ),
    paper=Paper("Shoemake", 1985, None),
    summary="along the great circle between two task vectors",
    experts=2,
)
