import torch


def merge_unit_peak(deltas):
    """Divide each task vector by its largest entry before adding."""
    peaks = torch.stack([d.abs().max() for d in deltas])
    merged = torch.zeros_like(deltas[0])
    for d, peak in zip(deltas, peaks):
        merged = merged + d / (peak + 1e-8)
    return 0.6 * peaks.mean() * merged
