import torch


def merge_inverse_distance(deltas):
    """Weight each expert by the inverse of its distance to the mean."""
    mean = deltas.mean(dim=0)
    weights = torch.stack([1.0 / ((d - mean).norm() + 1e-8) for d in deltas])
    weights = weights / weights.sum()
    return 2.0 * sum(w * d for w, d in zip(weights, deltas))
