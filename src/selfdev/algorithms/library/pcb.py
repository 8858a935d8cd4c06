"""PCB: entries compete within an expert and between experts."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import largest


def pcb(task_vectors: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Let entries compete within and between experts, and average (Du et al. 2024, arXiv 2410.02396).

    For expert i of n: intra = softmax(n normalised(d_i^2)), inter = sum over j of softmax(normalised(d_i
    d_j)), each softmax over the entries of the tensor. An entry's weight is intra times inter. The `density`
    share of entries with the highest weights is kept, and the merged value is the weighted mean of what is
    kept. The paper leaves the normalisation open; here it divides by the largest magnitude of the tensor.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of each task vector's entries kept, by weight; in (0, 1].
        scale: factor on the merged task vector.

    Returns:
        The merged task vector, shape (*parameter).
    """
    experts = len(task_vectors)
    flat = task_vectors.reshape(experts, -1)
    weights = torch.empty_like(flat)
    for index, own in enumerate(flat):
        intra = _softmax(experts * _normalised(own * own))
        inter = torch.zeros_like(own)
        for other in flat:
            inter += _softmax(_normalised(own * other))
        weights[index] = intra * inter
    weights = weights * largest(weights, density)
    total = weights.sum(dim=0)
    merged = (weights * flat).sum(dim=0) / torch.where(total > 0, total, 1.0)
    return scale * merged.reshape(task_vectors.shape[1:])


def _normalised(values: Tensor) -> Tensor:
    peak = values.abs().amax()
    return values / torch.where(peak > 0, peak, 1.0)


def _softmax(values: Tensor) -> Tensor:
    # Times the number of entries, so that products of two do not sink below float32; it cancels in the mean.
    return torch.softmax(values, dim=0) * values.numel()


METHOD = Method(
    name="pcb",
    function=pcb,
    parameters=(
        Parameter("density", default=0.2, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
    ),
    paper=Paper("Du et al.", 2024, "2410.02396"),
    summary="entries weighted by competition within and between experts",
)
