"""Consensus Task Arithmetic: drop the entries that matter to too few experts."""

from torch import Tensor

from selfdev.algorithms.library.blocks import entrywise
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.errors import UserError


def consensus_ta(
    task_vectors: Tensor, *, strictness: float = 0.4, agreement: int = 2, scale: float = 0.3
) -> Tensor:
    """Keep the entries of the sum that matter to several experts (Wang et al. 2024, arXiv 2405.07813).

    An entry of the sum s matters to the expert with task vector d where |d| >= strictness |s - d| (its TALL
    mask). Entries that matter to fewer than `agreement` experts are dropped.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        strictness: lambda of the TALL masks, at least 0; the paper searches 0.2 to 0.6.
        agreement: to how many experts an entry must matter, a whole number, at least 1; one above the number of
            experts counts as that number. The paper uses 2.
        scale: factor on the sum; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not (strictness >= 0.0 and agreement >= 1):
        raise UserError(f"strictness {strictness} must be at least 0 and agreement {agreement} at least 1")

    def merged(block: Tensor) -> Tensor:
        total = block.sum(dim=0)
        matters = block.abs() >= strictness * (total - block).abs()
        return total.mul_(matters.sum(dim=0) >= min(agreement, len(block)))

    return entrywise(merged, task_vectors).mul_(scale)


METHOD = Method(
    name="consensus_ta",
    function=consensus_ta,
    parameters=(
        Parameter("strictness", default=0.4, low=0.1, high=1.0),
        Parameter("agreement", default=2, low=1, high=3, integer=True),
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
    ),
    paper=Paper("Wang et al.", 2024, "2405.07813"),
    summary="the sum where it matters to several experts",
    entrywise=True,
)
