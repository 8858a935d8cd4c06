import torch


def merge_cosine(deltas):
    """Weight each expert by its cosine similarity to the sum of all."""
    total = deltas.sum(dim=0).flatten()
    merged = torch.zeros_like(deltas[0])
    for d in deltas:
        weight = torch.cosine_similarity(d.flatten(), total, dim=0)
        merged = merged + weight * d
    return 0.8 * merged
