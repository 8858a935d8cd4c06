import torch


def merge_flat_spectrum(deltas):
    """Move the singular values of the sum halfway to their mean."""
    total = deltas.sum(dim=0)
    if total.dim() != 2:
        return 0.5 * total
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    s = 0.5 * s + 0.5 * s.mean()
    return 0.6 * (u * s) @ v
