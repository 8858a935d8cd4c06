def merge_self_weighted(deltas):
    """Weight each entry by its own magnitude."""
    weights = deltas.abs()
    total = weights.sum(dim=0) + 1e-8
    return 1.5 * (weights * deltas).sum(dim=0) / total
