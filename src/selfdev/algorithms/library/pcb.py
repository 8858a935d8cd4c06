"""PCB: entries compete within an expert and between experts."""

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import blockwise, in_blocks
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.trimming import thresholds

# Entries that compete at a time, for few experts: each has as many values as there are experts, for every expert.
_BLOCK = 1 << 15


def pcb(task_vectors: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Let entries compete within and between experts, and average (Du et al. 2024, arXiv 2410.02396).

    For expert i of n: intra = softmax(n normalised(d_i^2)), inter = sum over j of softmax(normalised(d_i
    d_j)), each softmax over the entries of the tensor. An entry's weight is intra times inter. The `density`
    share of entries with the highest weights is kept, and the merged value is the weighted mean of what is
    kept. The paper leaves the normalisation open; here it divides by the largest magnitude of the tensor.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of each task vector's entries kept, by weight; in (0, 1].
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    flat = task_vectors.reshape(len(task_vectors), -1)
    blocks = [
        (entries, flat[:, entries])
        for entries in in_blocks(flat.shape[1], max(1 << 10, 4 * _BLOCK // max(4, len(flat))))
    ]
    # Added up block by block: a list of small tensors would keep what lies between them from being used again.
    peaks = flat.new_zeros(len(flat), len(flat))
    for _, block in blocks:
        torch.maximum(peaks, _products(block).abs_().amax(dim=2), out=peaks)
    peaks = torch.where(peaks > 0, peaks, 1.0)
    sums = flat.new_zeros(len(flat), 1 + len(flat), dtype=torch.float64)
    for _, block in blocks:
        sums += _powers(block, peaks).sum(dim=2, dtype=torch.float64)
    # Divided by means instead of sums, so that products of two do not sink below float32; it cancels in the mean.
    means = (sums / flat.shape[1]).to(flat.dtype)[..., None]
    weights = torch.empty_like(flat)
    for entries, block in blocks:
        softmaxes = _powers(block, peaks).div_(means)
        torch.mul(softmaxes[:, 0], softmaxes[:, 1:].sum(dim=1), out=weights[:, entries])
    least = thresholds(weights, density)

    def merged(block: Tensor, entries: slice) -> Tensor:
        kept = weights[:, entries]
        kept.mul_(kept >= least)
        total = kept.sum(dim=0)
        return kept.mul_(block).sum(dim=0).div_(total.add_(total == 0))

    return blockwise(merged, task_vectors).mul_(scale)


def _products(block: Tensor) -> Tensor:
    """Of every pair of experts, shape (experts, experts, n)."""
    return block[:, None] * block


def _powers(block: Tensor, peaks: Tensor) -> Tensor:
    """What each expert's softmaxes sum up, the one within it first: shape (experts, 1 + experts, n)."""
    normalised = _products(block).div_(peaks[..., None])
    within = len(block) * normalised.diagonal().T[:, None]
    return torch.cat([within, normalised], dim=1).exp_()


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
