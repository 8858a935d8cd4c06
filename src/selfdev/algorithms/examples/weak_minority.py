import torch


def merge_weak_minority(deltas):
    """Add the stronger side of each entry whole and the weaker side by half."""
    positive = deltas.clamp(min=0).sum(dim=0)
    negative = deltas.clamp(max=0).sum(dim=0)
    larger = positive > -negative
    return 0.6 * torch.where(larger, positive + 0.5 * negative, negative + 0.5 * positive)
