"""Iso-C: singular values made equal."""

from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components, each_matrix


@each_matrix
def iso_c(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Replace the singular values of the sum by their mean (Marczak et al. 2025, arXiv 2502.04959).

    With the sum U diag(values) V^T the merged matrix is mean(values) U V^T. The mean goes over all min(rows,
    columns) singular values; directions in which the sum is zero stay zero. Tensors that are no matrices are
    averaged, as in the paper.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector, the mean of the tensors that are no matrices included; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if task_vectors.dim() != 3:
        return scale * task_vectors.mean(dim=0)
    left, values, right = components(task_vectors.sum(dim=0))
    level = values.sum() / min(task_vectors.shape[1:])
    return scale * level * left @ right.T


METHOD = Method(
    name="iso_c",
    function=iso_c,
    parameters=(Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),),
    paper=Paper("Marczak et al.", 2025, "2502.04959"),
    summary="the sum with all singular values made equal",
)
