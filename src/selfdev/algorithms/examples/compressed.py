import torch


def merge_compressed(deltas):
    """Compress large entries with a logarithm, then weight the experts by sparsity."""
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        scale = d.abs().mean() + 1e-8
        weight = (d.abs() < 0.5 * scale).float().mean() + 0.2
        merged = merged + weight * scale * torch.sign(d) * torch.log1p(d.abs() / scale)
    return merged
