"""Model Breadcrumbs: neither the largest entries nor the small ones."""

from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import check_density
from selfdev.errors import UserError


def breadcrumbs(
    task_vectors: Tensor, *, density: float = 0.9, outliers: float = 0.01, scale: float = 0.3
) -> Tensor:
    """Drop the largest and the smallest entries of each expert, then add (arXiv 2312.06795).

    Davari and Belilovsky 2023, "Model Breadcrumbs". Of each task vector the `outliers` share of largest
    magnitudes is dropped, and of the rest the largest are kept until a `density` share of all entries stands.
    Entries equal to the last one kept, at either end, are kept too.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries kept, in (0, 1]; fewer remain if density + outliers exceeds 1.
        outliers: share of the entries dropped as too large, in [0, 1).
        scale: factor on the sum.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    if not 0.0 <= outliers < 1.0:
        raise UserError(f"outliers {outliers}: it is the share of entries dropped; give a number in [0, 1)")
    magnitudes = task_vectors.reshape(len(task_vectors), -1).abs()
    entries = magnitudes.shape[1]
    last = max(1, entries - int(outliers * entries))
    first = max(1, last - max(1, int(density * entries)) + 1)
    low = magnitudes.kthvalue(first, dim=1, keepdim=True).values
    high = magnitudes.kthvalue(last, dim=1, keepdim=True).values
    kept = (magnitudes >= low) & (magnitudes <= high)
    return scale * (task_vectors * kept.reshape(task_vectors.shape)).sum(dim=0)


METHOD = Method(
    name="breadcrumbs",
    function=breadcrumbs,
    parameters=(
        Parameter("density", default=0.9, low=0.1, high=1.0),
        Parameter("outliers", default=0.01, low=0.0, high=0.2),
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
    ),
    paper=Paper("Davari and Belilovsky", 2023, "2312.06795"),
    summary="drop the largest and the smallest entries, add the rest",
)
