import torch


def merge_elected_extreme(deltas):
    """Take the largest value where the sum is positive and the smallest where it is not."""
    stacked = torch.stack(deltas)
    high = stacked.max(dim=0).values
    low = stacked.min(dim=0).values
    return 0.9 * torch.where(stacked.sum(dim=0) > 0, high, low)
