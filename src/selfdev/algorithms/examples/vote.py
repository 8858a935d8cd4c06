import torch


def merge_vote(deltas):
    """Scale the sum by the share of experts that agree on the sign."""
    stacked = torch.stack(deltas)
    vote = torch.sign(stacked).mean(dim=0).abs()
    return 0.8 * vote * stacked.sum(dim=0)
