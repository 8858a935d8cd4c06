"""Model Stock: how far to go from the seed toward the mean, by the angle between the experts."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import gram, gram_by_row

# Below this 1 + (n - 1) c counts as zero, and the seed stays: mergekit's bound.
_SINGULAR = 1e-6


def model_stock(
    task_vectors: Tensor, *, scale: float = 1.0, filter_wise: bool = False, reading: str = PAPER
) -> Tensor:
    """Scale the mean by the angle between the experts (Jang et al. 2024, arXiv 2403.19522).

    With the mean cosine c over all pairs of n experts the merged task vector is t times the mean, where t =
    n c / (1 + (n - 1) c). A negative c counts as 0, so that t stays in [0, 1] as in the paper: experts that
    have nothing in common leave the seed as it is. One expert is returned as it is.

    mergekit takes a negative c as it is: between -1 / (n - 1) and 0 it goes away from the mean. It counts
    products of norms below 1e-6 as 1e-6, which shrinks the cosine of tiny task vectors. `reading="mergekit"`
    does both.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector, any number; 1 is the paper's method, others are our addition for
            tuning.
        filter_wise: whether each row has an angle and a share of its own, along the last dimension.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    experts = len(task_vectors)
    mean = task_vectors.mean(dim=0)
    if experts == 1:
        return mean.mul_(scale)
    filter_wise = filter_wise and mean.dim() > 0  # a number has no rows
    products = gram_by_row(task_vectors) if filter_wise else gram(task_vectors)
    norms = products.diagonal().movedim(-1, 0).sqrt()
    least = _SINGULAR if reading == MERGEKIT else torch.finfo(torch.float64).tiny
    cosines = (products / (norms[:, None] * norms[None]).clamp(min=least)).clamp(-1.0, 1.0)
    pairs = torch.triu_indices(experts, experts, offset=1)
    cosine = cosines[pairs[0], pairs[1]].mean(dim=0)
    if reading != MERGEKIT:
        cosine = cosine.clamp(min=0.0)
    divisor = 1.0 + (experts - 1) * cosine
    share = torch.where(divisor.abs() < _SINGULAR, 0.0, experts * cosine / divisor)
    share = scale * share
    return mean.mul_((share[..., None] if filter_wise else share).to(mean.dtype))


METHOD = Method(
    name="model_stock",
    function=model_stock,
    parameters=(
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        Parameter("filter_wise", default=False, choices=(True, False)),
        READING,
    ),
    paper=Paper("Jang et al.", 2024, "2403.19522"),
    summary="the mean of the experts, scaled by the angle between them",
)
