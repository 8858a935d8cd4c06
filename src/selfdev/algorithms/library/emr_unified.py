"""EMR's unified task vector: an elected sign at the largest agreeing magnitude."""

from torch import Tensor

from selfdev.algorithms.library.blocks import entrywise
from selfdev.algorithms.library.sign_election import elected_sign
from selfdev.algorithms.library.specification import Method, Paper, Parameter


def emr_unified(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Elect a sign and take the largest magnitude that has it (Huang et al. 2024, arXiv 2405.17461).

    An entry to which the experts give the values d becomes s max(s d), where s is the sign of their sum, or 0. This
    is the unified task vector of EMR-Merging, without the masks and rescalers that the paper keeps for each task.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """

    def merged(block: Tensor) -> Tensor:
        sign = elected_sign(block)
        return (block * sign).clamp_(min=0.0).amax(dim=0).mul_(sign)

    return entrywise(merged, task_vectors).mul_(scale)


METHOD = Method(
    name="emr_unified",
    function=emr_unified,
    parameters=(Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),),
    paper=Paper("Huang et al.", 2024, "2405.17461"),
    summary="the elected sign with the largest agreeing magnitude",
    entrywise=True,
)
