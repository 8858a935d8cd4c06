import torch


def merge_inverse_variance(deltas):
    """Weight each expert by the inverse of its mean square."""
    powers = torch.stack([d.square().mean() for d in deltas])
    weights = 1.0 / (powers + 0.1 * powers.mean() + 1e-12)
    weights = weights / weights.sum()
    return 2.0 * sum(w * d for w, d in zip(weights, deltas))
