import torch


def merge_sign_mean(deltas):
    """Combine the sign of the sum with the mean magnitude."""
    sign = torch.sign(deltas.sum(dim=0))
    magnitude = deltas.abs().mean(dim=0)
    return 1.2 * sign * magnitude
