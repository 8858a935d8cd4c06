def merge_shared_and_special(deltas):
    """Add to the mean the largest deviations of each expert from it."""
    mean = deltas.mean(dim=0)
    merged = mean.clone()
    for d in deltas:
        deviation = d - mean
        limit = 1.5 * deviation.abs().mean()
        merged = merged + deviation * (deviation.abs() > limit)
    return merged
