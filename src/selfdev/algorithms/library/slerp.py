"""SLERP and NuSLERP: along the great circle between two experts."""

from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.sphere import slerp as along_great_circle
from selfdev.errors import UserError

_PAPER = Paper("Shoemake", 1985, None)
_T = Parameter("t", default=0.5, low=0.0, high=1.0)


def slerp(task_vectors: Tensor, seed_tensor: Tensor, *, t: float = 0.5) -> Tensor:
    """Interpolate the weights of two experts along a great circle (Shoemake 1985).

    Here the tensors on the sphere are the experts' weights, seed plus task vector.

    Args:
        task_vectors: shape (2, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter).
        t: how far to go from the first expert (0) to the second (1).

    Returns:
        The merged task vector, shape (*parameter): what to add to the seed's tensor.
    """
    first, second = _two(task_vectors)
    return along_great_circle(seed_tensor + first, seed_tensor + second, t) - seed_tensor


def nuslerp(task_vectors: Tensor, *, t: float = 0.5, scale: float = 1.0) -> Tensor:
    """Interpolate two task vectors along a great circle (Shoemake 1985).

    What mergekit calls NuSLERP with a base model.

    Args:
        task_vectors: shape (2, *parameter), float32.
        t: how far to go from the first expert (0) to the second (1).
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    first, second = _two(task_vectors)
    return scale * along_great_circle(first, second, t)


def _two(task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    if len(task_vectors) != 2:
        raise UserError(
            f"a great circle joins 2 experts, not {len(task_vectors)}; use 'karcher' for any other number"
        )
    return task_vectors[0], task_vectors[1]


METHOD = Method(
    name="slerp",
    function=slerp,
    parameters=(_T,),
    paper=_PAPER,
    summary="along the great circle between the weights of two experts",
    needs_seed=True,
    experts=2,
)

NU_METHOD = Method(
    name="nuslerp",
    function=nuslerp,
    parameters=(_T, Parameter("scale", default=1.0, low=0.2, high=3.0, log=True, screened=False)),
    paper=_PAPER,
    summary="along the great circle between two task vectors",
    experts=2,
)
