import torch


def merge_geometric(deltas):
    """Combine the sign of the sum with the geometric mean of the magnitudes."""
    stacked = torch.stack(deltas)
    sign = torch.sign(stacked.sum(dim=0))
    scale = stacked.abs().mean() + 1e-8
    magnitude = (stacked.abs() + 0.1 * scale).log().mean(dim=0).exp()
    return 0.7 * len(deltas) * sign * magnitude
