import torch


def merge_shrink_spread(deltas):
    """Shrink the sum where the experts disagree."""
    stacked = torch.stack(deltas)
    mean = stacked.mean(dim=0)
    spread = stacked.std(dim=0)
    trust = mean.abs() / (mean.abs() + spread + 1e-8)
    return trust * stacked.sum(dim=0)
