"""Task Arithmetic with a weight for each expert."""

from collections.abc import Sequence

from torch import Tensor

from selfdev.algorithms.library.sign_election import combine
from selfdev.algorithms.library.specification import Method, Paper, Parameter


def weighted_task_arithmetic(task_vectors: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Add the task vectors, each with a weight of its own (Ilharco et al. 2022, arXiv 2212.04089).

    Args:
        task_vectors: shape (experts, *parameter), float32.
        weights: one factor for each expert, any numbers; all 1 / experts if None.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if weights is None:
        return task_vectors.mean(dim=0)
    return combine(task_vectors, elect=False, normalize=False, weights=weights)


METHOD = Method(
    name="weighted_task_arithmetic",
    function=weighted_task_arithmetic,
    parameters=(Parameter("weights", default=None, low=0.0, high=1.5, per_expert=True),),
    paper=Paper("Ilharco et al.", 2022, "2212.04089"),
    summary="the sum of the task vectors with a weight for each expert",
    entrywise=True,
)
