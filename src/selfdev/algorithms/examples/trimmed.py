import torch


def merge_trimmed(deltas):
    """Drop the small entries of each task vector, then add."""
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        count = max(1, d.numel() // 5)
        threshold = d.abs().flatten().topk(count).values[-1]
        merged = merged + d * (d.abs() >= threshold)
    return 0.8 * merged
