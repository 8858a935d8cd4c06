import torch


def merge_soft_threshold(deltas):
    """Move all entries toward zero by the mean magnitude, then add."""
    cleaned = []
    for d in deltas:
        threshold = d.abs().mean()
        cleaned.append(torch.sign(d) * (d.abs() - threshold).clamp(min=0))
    return torch.stack(cleaned).sum(dim=0)
