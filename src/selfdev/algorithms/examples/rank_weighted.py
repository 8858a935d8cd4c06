import torch


def merge_rank_weighted(deltas):
    """Weight the experts by the rank of their norms, the largest first."""
    norms = torch.stack([d.norm() for d in deltas])
    order = torch.argsort(norms, descending=True)
    merged = torch.zeros_like(deltas[0])
    for rank, index in enumerate(order):
        merged = merged + deltas[index] / (1 + rank)
    return 0.7 * merged
