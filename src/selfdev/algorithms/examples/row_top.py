import torch


def merge_row_top(deltas):
    """Keep the larger half of each row of every expert, rescaled to the norm it had."""
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        count = (d.shape[-1] + 1) // 2
        threshold = d.abs().topk(count, dim=-1).values[..., -1:]
        kept = d * (d.abs() >= threshold)
        merged = merged + kept * d.norm() / (kept.norm() + 1e-8)
    return 0.5 * merged
