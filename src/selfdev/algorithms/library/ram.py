"""RAM: average what several experts changed, keep what only one did."""

from torch import Tensor
from torch.nn.functional import hardshrink

from selfdev.algorithms.library.blocks import entrywise
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.errors import UserError


def ram(task_vectors: Tensor, *, threshold: float = 1e-5, scale: float = 1.0) -> Tensor:
    """Average each entry over the experts that changed it (Yuan et al. 2026, arXiv 2601.13572).

    An expert changed an entry where the magnitude of its task vector exceeds `threshold`. Shared entries
    become the mean over those experts, and an entry that one expert alone changed keeps its value.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        threshold: magnitude in units of the weights, at least 0; the paper uses 1e-5.
        scale: factor on the merged task vector, any number; 1 is the paper's method.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not threshold >= 0.0:
        raise UserError(f"threshold {threshold}: it is a magnitude; give a number of at least 0")

    def merged(block: Tensor) -> Tensor:
        changed = hardshrink(block, threshold)
        return scale * changed.sum(dim=0) / changed.sign().abs_().sum(dim=0).clamp_(min=1.0)

    return entrywise(merged, task_vectors)


METHOD = Method(
    name="ram",
    function=ram,
    parameters=(
        Parameter("threshold", default=1e-5, low=1e-6, high=1e-1, log=True),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Yuan et al.", 2026, "2601.13572"),
    summary="shared entries averaged, entries of one expert kept whole",
    entrywise=True,
)
