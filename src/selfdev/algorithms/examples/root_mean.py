import torch


def merge_root_mean(deltas):
    """Average the signed square roots of the entries, and square the average."""
    roots = torch.sign(deltas) * deltas.abs().sqrt()
    mean = roots.mean(dim=0)
    return len(deltas) * mean * mean.abs()
