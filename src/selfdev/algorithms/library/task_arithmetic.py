"""Task Arithmetic: the sum of the task vectors, with one scale for all."""

from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter


def task_arithmetic(task_vectors: Tensor, *, scale: float = 0.3) -> Tensor:
    """Add the task vectors and scale the sum (Ilharco et al. 2022, arXiv 2212.04089).

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the sum, any number; the paper's experiments choose it between 0 and 1.

    Returns:
        The merged task vector, shape (*parameter).
    """
    return task_vectors.sum(dim=0).mul_(scale)


METHOD = Method(
    name="task_arithmetic",
    function=task_arithmetic,
    parameters=(Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),),
    paper=Paper("Ilharco et al.", 2022, "2212.04089"),
    summary="one scale on the sum of the task vectors",
    entrywise=True,
)
