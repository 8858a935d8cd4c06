import torch


def merge_column_weights(deltas):
    """Weight the experts in each column by the share of the norm they hold there."""
    norms = torch.stack([d.norm(dim=0) for d in deltas])
    weights = norms / (norms.sum(dim=0) + 1e-8)
    merged = torch.zeros_like(deltas[0])
    for w, d in zip(weights, deltas):
        merged = merged + w * d
    return 2.0 * merged
