"""The plain mean of the experts."""

from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper


def linear(task_vectors: Tensor) -> Tensor:
    """Average the task vectors: a uniform model soup (Wortsman et al. 2022, arXiv 2203.05482).

    Args:
        task_vectors: shape (experts, *parameter), float32.

    Returns:
        The merged task vector, shape (*parameter).
    """
    return task_vectors.mean(dim=0)


METHOD = Method(
    name="linear",
    function=linear,
    parameters=(),
    paper=Paper("Wortsman et al.", 2022, "2203.05482"),
    summary="the mean of the experts (model soup)",
)
