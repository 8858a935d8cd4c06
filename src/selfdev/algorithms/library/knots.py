"""KnOTS: align the experts by one joint SVD, then merge as TIES does."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components
from selfdev.algorithms.library.ties import ties


def knots(task_vectors: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Merge the right factors of a joint SVD by TIES (Stoica et al. 2024, arXiv 2410.19735).

    The matrices side by side are U S [V_1 ... V_n]; the parts V_i are merged by TIES, and the result is U S
    V. Tensors that are no matrices are merged by TIES as they are.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries of each V_i kept, by magnitude; in (0, 1].
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if task_vectors.dim() != 3:
        return ties(task_vectors, density=density, scale=scale)
    left, values, right = components(torch.cat(tuple(task_vectors), dim=1))
    if len(values) == 0:
        return torch.zeros_like(task_vectors[0])
    parts = torch.stack(right.T.chunk(len(task_vectors), dim=1))
    return scale * (left * values) @ ties(parts, density=density)


METHOD = Method(
    name="knots",
    function=knots,
    parameters=(
        Parameter("density", default=0.2, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Stoica et al.", 2024, "2410.19735"),
    summary="TIES in the common basis of a joint SVD",
)
