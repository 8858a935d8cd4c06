import torch


def merge_sorted_entries(deltas):
    """Sort the experts at each entry by magnitude, and give the later ones less weight."""
    order = deltas.abs().argsort(dim=0, descending=True)
    merged = torch.zeros_like(deltas[0])
    for rank, value in enumerate(deltas.gather(0, order)):
        merged = merged + value * 0.5**rank
    return 0.7 * merged
