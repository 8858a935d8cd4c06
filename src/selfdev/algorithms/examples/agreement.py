import torch


def merge_agreement(deltas):
    """Average, at each entry, the experts whose sign agrees with that of the sum."""
    stacked = torch.stack(deltas)
    sign = torch.sign(stacked.sum(dim=0))
    mask = (torch.sign(stacked) == sign).float()
    return (stacked * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
