import torch


def merge_trim_cosine(deltas):
    """Drop the smaller half of each task vector, then weight by similarity to the mean."""
    cleaned = []
    for d in deltas:
        threshold = d.abs().flatten().kthvalue((d.numel() + 1) // 2).values
        cleaned.append(d * (d.abs() > threshold))
    mean = torch.stack(cleaned).mean(dim=0).flatten()
    weights = [torch.cosine_similarity(c.flatten(), mean, dim=0) for c in cleaned]
    return sum(w * c for w, c in zip(weights, cleaned))
