"""SLERP and NuSLERP: along the great circle between two experts."""

from torch import Tensor

from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import combination, gram, gram_by_row
from selfdev.algorithms.library.sphere import slerp as along_great_circle
from selfdev.errors import UserError

_PAPER = Paper("Shoemake", 1985, None)
_T = Parameter("t", default=0.5, low=0.0, high=1.0)

# Above this cosine mergekit interpolates linearly. Fine-tuned relatives of one seed nearly always lie above.
_MERGEKITS_PARALLEL = 0.9995


def slerp(task_vectors: Tensor, seed_tensor: Tensor, *, t: float = 0.5, reading: str = PAPER) -> Tensor:
    """Interpolate the weights of two experts along a great circle (Shoemake 1985).

    Here the tensors on the sphere are the experts' weights, seed plus task vector. mergekit interpolates
    linearly where the cosine's magnitude exceeds 0.9995, which `reading="mergekit"` does too; here only
    where it is 1 to the precision of float32. mergekit knows no seed: its base model is the first expert.

    Args:
        task_vectors: shape (2, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter).
        t: how far to go from the first expert (0) to the second (1).
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter): what to add to the seed's tensor.
    """
    _check_two(task_vectors)
    parallel = _MERGEKITS_PARALLEL if reading == MERGEKIT else None
    factors = along_great_circle(gram(task_vectors, seed_tensor), t, parallel)
    return combination(factors, task_vectors, seed_tensor)


def nuslerp(
    task_vectors: Tensor,
    *,
    t: float = 0.5,
    scale: float = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
    reading: str = PAPER,
) -> Tensor:
    """Interpolate two task vectors along a great circle (Shoemake 1985).

    What mergekit calls NuSLERP with a base model, whose two weights give t = second / (first + second). A zero
    task vector has no direction: here it is interpolated linearly, while mergekit takes it to be at a right
    angle, which `reading="mergekit"` does too.

    Args:
        task_vectors: shape (2, *parameter), float32.
        t: how far to go from the first expert (0) to the second (1).
        scale: factor on the merged task vector.
        flatten: whether a task vector is one direction; else it is many, along its last dimension: mergekit's
            `nuslerp_flatten`.
        row_wise: the directions of a tensor that is not flattened lie along its first dimension: mergekit's
            `nuslerp_row_wise`.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    _check_two(task_vectors)
    orthogonal = reading == MERGEKIT
    if flatten:
        factors = along_great_circle(gram(task_vectors), t, zero_is_orthogonal=orthogonal)
        return combination(scale * factors, task_vectors)
    directions = task_vectors.transpose(1, -1) if row_wise else task_vectors
    factors = along_great_circle(gram_by_row(directions), t, zero_is_orthogonal=orthogonal)
    merged = (directions * factors[..., None].to(directions.dtype)).sum(dim=0).mul_(scale)
    return merged.transpose(0, -1).contiguous() if row_wise else merged


def _check_two(task_vectors: Tensor) -> None:
    if len(task_vectors) != 2:
        raise UserError(
            f"a great circle joins 2 experts, not {len(task_vectors)}; use 'karcher' for any other number"
        )


METHOD = Method(
    name="slerp",
    function=slerp,
    parameters=(_T, READING),
    paper=_PAPER,
    summary="along the great circle between the weights of two experts",
    needs_seed=True,
    experts=2,
)

NU_METHOD = Method(
    name="nuslerp",
    function=nuslerp,
    parameters=(
        _T,
        Parameter("scale", default=1.0, low=0.2, high=3.0, log=True, screened=False),
        Parameter("flatten", default=True, choices=(True, False)),
        Parameter("row_wise", default=False, choices=(True, False)),
        READING,
    ),
    paper=_PAPER,
    summary="along the great circle between two task vectors",
    experts=2,
)
