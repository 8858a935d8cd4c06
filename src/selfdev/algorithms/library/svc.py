"""SVC: take back what shared directions were counted too often."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components, each_matrix
from selfdev.errors import UserError

# The share of the sum's response below which an expert has none of its own in a direction.
_ABSENT = 1e-5


@each_matrix
def svc(task_vectors: Tensor, *, floor: float = 1.0, scale: float = 1.0) -> Tensor:
    """Calibrate the singular values of the sum (Li et al. 2026, arXiv 2602.05536).

    Along the left singular vector u of the sum S, the response of the sum is u^T S and that of expert i is
    u^T D_i. The projection coefficient s_i = <u^T S, u^T D_i> / |u^T D_i|^2 says how much larger the sum's
    is, and the singular value is multiplied by experts / sum over i of max(floor, s_i). Tensors that are no
    matrices are averaged.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        floor: alpha of the paper, above 0: the least that a coefficient counts, which is also what an expert
            without a response counts. Larger ones shrink more evenly.
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not floor > 0.0:
        raise UserError(f"floor {floor}: it is the least that a coefficient counts; give a number above 0")
    if task_vectors.dim() != 3:
        return scale * task_vectors.mean(dim=0)
    left, values, right = components(task_vectors.sum(dim=0))
    counted = torch.zeros_like(values)
    for vector in task_vectors:
        # Rows are directions: (k, columns).
        response = left.T @ vector
        power = response.square().sum(dim=1)
        coefficient = values * response.mul_(right.T).sum(dim=1) / torch.where(power > 0, power, 1.0)
        # A response that is nothing but rounding would count as a sum that is millions of times too large.
        absent = power <= (_ABSENT * values).square()
        counted += coefficient.clamp(min=floor).masked_fill(absent, floor)
    factors = len(task_vectors) / counted
    return scale * (left * (factors * values)) @ right.T


METHOD = Method(
    name="svc",
    function=svc,
    parameters=(
        Parameter("floor", default=1.0, low=0.1, high=3.0, log=True),
        Parameter("scale", default=1.0, low=0.1, high=3.0, log=True, screened=False),
    ),
    paper=Paper("Li et al.", 2026, "2602.05536"),
    summary="the sum with shared directions counted once",
)
