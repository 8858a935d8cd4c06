import torch


def merge_pairwise_minimum(deltas):
    """For each pair of experts, keep the smaller of two values with the same sign."""
    merged = torch.zeros_like(deltas[0])
    for i in range(len(deltas)):
        for j in range(i):
            same = (deltas[i] * deltas[j] > 0).float()
            smaller = torch.minimum(deltas[i].abs(), deltas[j].abs())
            merged = merged + same * torch.sign(deltas[i]) * smaller
    return 1.5 * merged / (len(deltas) - 1)
