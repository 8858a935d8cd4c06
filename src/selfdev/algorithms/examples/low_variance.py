import torch


def merge_low_variance(deltas):
    """Keep the entries on which the experts differ less than usual, and halve the others."""
    variance = deltas.var(dim=0)
    mask = torch.where(variance <= variance.mean(), 1.0, 0.3)
    return 0.7 * mask * deltas.sum(dim=0)
