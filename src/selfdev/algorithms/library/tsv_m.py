"""TSV-M: the strongest singular directions of each expert, made orthogonal to those of the others."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components, each_matrix, orthogonal


@each_matrix
def tsv_m(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Keep 1 / experts of each expert's singular components, orthogonalise, add (arXiv 2412.00081).

    Gargiulo et al. 2024, "Task Singular Vectors". The left and right singular vectors of all experts are put
    side by side, each set is replaced by the nearest orthonormal one, and the merged matrix is U
    diag(values) V^T. Tensors that are no matrices are averaged, as in the paper.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector, the mean of the tensors that are no matrices included; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if task_vectors.dim() != 3:
        return scale * task_vectors.mean(dim=0)
    rank = max(1, min(task_vectors.shape[1:]) // len(task_vectors))
    found = (components(matrix, rank) for matrix in task_vectors)
    lefts, values, rights = map(list, zip(*found, strict=True))
    left = orthogonal(lefts).mul_(scale * torch.cat(values))
    return left @ orthogonal(rights).T


METHOD = Method(
    name="tsv_m",
    function=tsv_m,
    parameters=(Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),),
    paper=Paper("Gargiulo et al.", 2024, "2412.00081"),
    summary="the strongest singular directions of each expert, made orthogonal",
)
