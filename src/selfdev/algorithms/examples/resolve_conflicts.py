import torch


def merge_resolve_conflicts(deltas):
    """Remove from each row what points against the same row of the sum of the others."""
    total = deltas.sum(dim=0)
    merged = torch.zeros_like(total)
    for d in deltas:
        others = total - d
        dot = (d * others).sum(dim=-1, keepdim=True).clamp(max=0)
        power = others.square().sum(dim=-1, keepdim=True)
        merged = merged + d - dot / (power + 1e-12) * others
    return 0.5 * merged
