"""The plain or weighted mean of the experts."""

from collections.abc import Sequence

from torch import Tensor

from selfdev.algorithms.library.specification import WEIGHTS, Method, Paper
from selfdev.errors import UserError


def linear(task_vectors: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Average the task vectors: a model soup (Wortsman et al. 2022, arXiv 2203.05482).

    Args:
        task_vectors: shape (experts, *parameter), float32.
        weights: one for each expert, brought to sum 1, which must not be 0; equal if None.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if weights is None:
        return task_vectors.mean(dim=0)
    total = sum(weights)
    if total == 0.0:
        raise UserError(
            f"weights {list(weights)}: a mean divides by their sum, which is 0; change one of them"
        )
    merged = task_vectors[0] * (weights[0] / total)
    for expert, weight in zip(task_vectors[1:], weights[1:], strict=True):
        merged.add_(expert, alpha=weight / total)
    return merged


METHOD = Method(
    name="linear",
    function=linear,
    parameters=(WEIGHTS,),
    paper=Paper("Wortsman et al.", 2022, "2203.05482"),
    summary="the mean of the experts (model soup)",
)
