import torch


def merge_agreement(deltas):
    """Average, at each entry, the experts whose sign agrees with that of the sum."""
    sign = torch.sign(deltas.sum(dim=0))
    mask = (torch.sign(deltas) == sign).float()
    return (deltas * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
