"""TIES: trim, elect a sign, merge those that agree."""

from torch import Tensor

from selfdev.algorithms.library.sign_election import disjoint_mean
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import keep_largest


def ties(task_vectors: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim, elect a sign, and average those that agree (Yadav et al. 2023, arXiv 2306.01708).

    The trimmed task vectors keep their largest entries by magnitude; the elected sign of an entry is that of
    the sum of the trimmed values; the merged value is the mean of the non-zero ones with that sign. The paper
    trims over the whole model at once, here each tensor is trimmed on its own.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of each task vector's entries kept, by magnitude; in (0, 1].
        scale: factor on the merged task vector; the paper searches 0.8 to 3.

    Returns:
        The merged task vector, shape (*parameter).
    """
    return scale * disjoint_mean(keep_largest(task_vectors, density))


METHOD = Method(
    name="ties",
    function=ties,
    parameters=(
        Parameter("density", default=0.2, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Yadav et al.", 2023, "2306.01708"),
    summary="trim small entries, elect a sign, average the values that agree",
)
