import torch


def merge_winsorized(deltas):
    """Cut the largest tenth of the entries down to the limit, then weight by norm."""
    cleaned = []
    for d in deltas:
        k = int(0.9 * d.numel()) + 1
        limit = d.abs().flatten().kthvalue(k).values
        cleaned.append(d.clamp(-limit, limit))
    norms = torch.stack([c.norm() for c in cleaned])
    weights = norms / (norms.max() + 1e-8)
    return 0.7 * sum(w * c for w, c in zip(weights, cleaned))
