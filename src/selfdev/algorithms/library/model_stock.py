"""Model Stock: how far to go from the seed toward the mean, by the angle between the experts."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter


def model_stock(task_vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    """Scale the mean by the angle between the experts (Jang et al. 2024, arXiv 2403.19522).

    With the mean cosine c over all pairs of n experts the merged task vector is t times the mean, where t =
    n c / (1 + (n - 1) c). A negative c counts as 0, so that t stays in [0, 1] as in the paper: experts that
    have nothing in common leave the seed as it is. One expert is returned as it is.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        scale: factor on the merged task vector; 1 is the paper's method, others are our addition for tuning.

    Returns:
        The merged task vector, shape (*parameter).
    """
    experts = len(task_vectors)
    mean = task_vectors.mean(dim=0)
    if experts == 1:
        return scale * mean
    flat = task_vectors.reshape(experts, -1)
    directions = torch.nn.functional.normalize(flat, dim=1)
    cosines = directions @ directions.T
    above = torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)
    cosine = cosines[above].mean().clamp(0.0, 1.0)
    share = experts * cosine / (1.0 + (experts - 1) * cosine)
    return scale * share * mean


METHOD = Method(
    name="model_stock",
    function=model_stock,
    parameters=(Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),),
    paper=Paper("Jang et al.", 2024, "2403.19522"),
    summary="the mean of the experts, scaled by the angle between them",
)
