import torch


def merge_softmax_entries(deltas):
    """Weight the experts at each entry by a softmax of their magnitudes."""
    scale = deltas.abs().mean() + 1e-8
    weights = torch.softmax(deltas.abs() / scale, dim=0)
    return 1.5 * (weights * deltas).sum(dim=0)
