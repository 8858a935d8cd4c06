import torch


def merge_sign_mean(deltas):
    """Combine the sign of the sum with the mean magnitude."""
    stacked = torch.stack(deltas)
    sign = torch.sign(stacked.sum(dim=0))
    magnitude = stacked.abs().mean(dim=0)
    return 1.2 * sign * magnitude
