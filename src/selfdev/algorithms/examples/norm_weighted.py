import torch


def merge_norm_weighted(deltas):
    """Weight each task vector by its norm."""
    norms = torch.stack([d.norm() for d in deltas])
    weights = norms / (norms.sum() + 1e-8)
    return 2.0 * sum(w * d for w, d in zip(weights, deltas))
