import torch


def merge_quadratic(deltas):
    """Add the signed squares of the entries, and take the signed root."""
    squares = (deltas * deltas.abs()).sum(dim=0)
    return 0.9 * torch.sign(squares) * squares.abs().sqrt()
