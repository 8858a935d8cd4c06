"""Which entries of a task vector are kept by chance, each with the same probability: what DARE does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Kept
from selfdev.algorithms.library.specification import MERGEKIT
from selfdev.algorithms.library.trimming import Shares, check_density, for_each, growth, masked

# Entries that are drawn at a time.
_DRAWN = 1 << 16


def thinned(task_vectors: Tensor, density: Shares, seed: int, reading: str, *, rescale: bool) -> Kept:
    """Keep entries by chance, each expert by draws of its own.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1].
        seed: of the drawing, a whole number in [0, 2^64).
        reading: `paper` or `mergekit`, which draws nothing for an expert of density 1.
        rescale: whether what is kept is divided by the density, or in mergekit's reading brought to the L1 norm of
            the whole.

    Returns:
        What is kept of each block, dropped entries being zero.
    """
    check_density(density)
    shares = for_each(density, len(task_vectors))
    masks = _drawn(shares, task_vectors[0].numel(), seed, reading).to(task_vectors.device)
    if reading == MERGEKIT:
        return masked(masks, list(map(growth, task_vectors, masks)) if rescale else ())
    kept = masked(masks)
    chances = task_vectors.new_tensor(shares)[:, None]
    return (lambda block, entries: kept(block, entries).div_(chances)) if rescale else kept


def _drawn(shares: Sequence[float], entries: int, seed: int, reading: str) -> Tensor:
    """Masks of the entries that are kept, shape (experts, entries), a quarter of what the entries take."""
    # A generator of its own, on the CPU and in float32, whatever torch's defaults: the drawing is the same everywhere.
    generator = torch.Generator().manual_seed(seed)
    masks = torch.ones(len(shares), entries, dtype=torch.bool)
    for mask, share in zip(masks, shares, strict=True):
        if reading == MERGEKIT and share == 1.0:
            continue  # mergekit draws nothing, which leaves the generator to the next expert as it is
        for block in mask.split(_DRAWN):
            torch.lt(torch.rand(len(block), generator=generator, dtype=torch.float32), share, out=block)
    return masks
