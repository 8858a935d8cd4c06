def merge_median(deltas):
    """Take the median of the experts at each entry."""
    middle = deltas.median(dim=0).values
    return 0.6 * len(deltas) * middle
