"""DARE: drop entries at random, rescale the rest, then merge."""

from torch import Tensor

from selfdev.algorithms.library.sign_election import disjoint_mean
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import check_density, keep_randomly

_PAPER = Paper("Yu et al.", 2023, "2311.03099")
_DENSITY = Parameter("density", default=0.5, low=0.1, high=1.0)
_SEED = Parameter("seed", default=0, low=0, high=2**31 - 1, integer=True, screened=False)


def dare_linear(task_vectors: Tensor, *, density: float = 0.5, scale: float = 0.3, seed: int = 0) -> Tensor:
    """Drop entries at random, divide the rest by the density, and add (Yu et al. 2023, arXiv 2311.03099).

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1]; the paper's drop rate is 1 - density.
        scale: factor on the sum.
        seed: of the drawing. Tensors of one shape get the same drawing from the same seed: give each tensor
            of a model a seed of its own.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    return scale * keep_randomly(task_vectors, density, seed).sum(dim=0)


def dare_ties(task_vectors: Tensor, *, density: float = 0.5, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Drop at random instead of trimming, then merge as TIES does (Yu et al. 2023, arXiv 2311.03099).

    Dropped entries do not vote; the sign is elected among the rescaled rest, and those that agree are
    averaged.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1]; the paper's drop rate is 1 - density.
        scale: factor on the merged task vector.
        seed: of the drawing, as in `dare_linear`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    return scale * disjoint_mean(keep_randomly(task_vectors, density, seed))


LINEAR_METHOD = Method(
    name="dare_linear",
    function=dare_linear,
    parameters=(
        _DENSITY,
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
        _SEED,
    ),
    paper=_PAPER,
    summary="drop entries at random, rescale the rest, add",
)

TIES_METHOD = Method(
    name="dare_ties",
    function=dare_ties,
    parameters=(
        _DENSITY,
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        _SEED,
    ),
    paper=_PAPER,
    summary="drop entries at random, rescale the rest, merge as TIES does",
)
