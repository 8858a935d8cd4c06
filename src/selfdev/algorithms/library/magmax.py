"""MagMax: the largest change wins."""

from torch import Tensor

from selfdev.algorithms.library.blocks import entrywise
from selfdev.algorithms.library.specification import Method, Paper, Parameter


def magmax(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Take at each entry the value of the largest magnitude (Marczak et al. 2024, arXiv 2407.06322).

    Two experts with opposite values of the same size cancel, so that their order does not matter.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector, any number; the paper searches 0 to 1.

    Returns:
        The merged task vector, shape (*parameter).
    """

    def merged(block: Tensor) -> Tensor:
        highest = block.amax(dim=0)
        lowest = block.amin(dim=0)
        largest = highest.where(highest.abs() > lowest.abs(), lowest)
        return largest.masked_fill_((highest == -lowest) & (highest != lowest), 0.0)

    return entrywise(merged, task_vectors).mul_(scale)


METHOD = Method(
    name="magmax",
    function=magmax,
    parameters=(Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),),
    paper=Paper("Marczak et al.", 2024, "2407.06322"),
    summary="at each entry the value of the largest magnitude",
    entrywise=True,
)
