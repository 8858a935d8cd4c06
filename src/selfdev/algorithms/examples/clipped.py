import torch


def merge_clipped(deltas):
    """Clip the extreme entries of each task vector before adding."""
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        limit = 1.5 * d.square().mean().sqrt()
        merged = merged + d.clamp(-limit, limit)
    return 0.5 * merged
