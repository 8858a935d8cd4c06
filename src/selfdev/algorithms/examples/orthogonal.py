import torch


def merge_orthogonal(deltas):
    """Add of each task vector only what is orthogonal to the sum so far."""
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        overlap = (d * merged).sum() / (merged.square().sum() + 1e-12)
        merged = merged + d - overlap * merged
    return 0.6 * merged
