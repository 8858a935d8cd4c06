import torch


def merge_entropy(deltas):
    """Give more weight to experts whose change is concentrated on few entries."""
    weights = []
    for d in deltas:
        share = d.abs() / (d.abs().sum() + 1e-8)
        entropy = -(share * (share + 1e-12).log()).sum()
        weights.append(torch.exp(-entropy))
    total = sum(weights)
    return 2.0 * sum(w / total * d for w, d in zip(weights, deltas))
