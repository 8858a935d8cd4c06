import torch


def merge_geometric(deltas):
    """Combine the sign of the sum with the geometric mean of the magnitudes."""
    sign = torch.sign(deltas.sum(dim=0))
    scale = deltas.abs().mean() + 1e-8
    magnitude = (deltas.abs() + 0.1 * scale).log().mean(dim=0).exp()
    return 0.7 * len(deltas) * sign * magnitude
