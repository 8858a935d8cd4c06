import torch


def merge_elected_extreme(deltas):
    """Take the largest value where the sum is positive and the smallest where it is not."""
    high = deltas.max(dim=0).values
    low = deltas.min(dim=0).values
    return 0.9 * torch.where(deltas.sum(dim=0) > 0, high, low)
