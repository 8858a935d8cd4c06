import torch


def merge_cautious(deltas):
    """Take the smallest magnitude where all signs agree, and a tenth of the sum elsewhere."""
    total = deltas.sum(dim=0)
    smallest = deltas.abs().min(dim=0).values * len(deltas)
    agree = torch.sign(deltas).sum(dim=0).abs() == len(deltas)
    return torch.where(agree, torch.sign(total) * smallest, 0.1 * total)
