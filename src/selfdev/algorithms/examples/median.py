import torch


def merge_median(deltas):
    """Take the median of the experts at each entry."""
    stacked = torch.stack(deltas)
    middle = stacked.median(dim=0).values
    return 0.6 * len(deltas) * middle
