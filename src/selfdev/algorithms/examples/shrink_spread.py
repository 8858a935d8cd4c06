def merge_shrink_spread(deltas):
    """Shrink the sum where the experts disagree."""
    mean = deltas.mean(dim=0)
    spread = deltas.std(dim=0)
    trust = mean.abs() / (mean.abs() + spread + 1e-8)
    return trust * deltas.sum(dim=0)
