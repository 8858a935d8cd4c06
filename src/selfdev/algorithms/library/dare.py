"""DARE: drop entries at random, rescale the rest, then merge."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Kept
from selfdev.algorithms.library.sign_election import combine
from selfdev.algorithms.library.specification import (
    MERGEKIT,
    NORMALIZE,
    PAPER,
    READING,
    RESCALE,
    WEIGHTS,
    Method,
    Paper,
    Parameter,
)
from selfdev.algorithms.library.trimming import (
    Shares,
    check_density,
    for_each,
    growth,
    masked,
)

# Entries that are drawn at a time.
_DRAWN = 1 << 16

_PAPER = Paper("Yu et al.", 2023, "2311.03099")
_DENSITY = Parameter("density", default=0.5, low=0.1, high=1.0, broadcast=True)
_SEED = Parameter("seed", default=0, low=0, high=2**31 - 1, integer=True, screened=False)


def dare_linear(
    task_vectors: Tensor,
    *,
    density: Shares = 0.5,
    scale: float = 0.3,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Drop entries at random, divide the rest by the density, and add (Yu et al. 2023, arXiv 2311.03099).

    mergekit does not divide by the density: it scales what is left of an expert to the L1 norm that it had
    before. `reading="mergekit"` does so, draws as mergekit does from the same seed, and divides a normalised
    sum by the weights instead of the number of experts.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1]; the paper's drop rate is 1 - density. One
            number, or one for each expert.
        scale: factor on the sum, mergekit's `lambda`.
        seed: of the drawing. Tensors of one shape get the same drawing from the same seed: give each tensor
            of a model a seed of its own.
        weights: a factor on each expert; all 1 if None.
        normalize: whether the sum is divided; None, as False, does not.
        rescale: False leaves what is kept as it is.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    kept = _thinned(task_vectors, density, seed, reading, rescale=rescale is not False)
    merged = combine(
        task_vectors, elect=False, normalize=normalize is True, weights=weights, kept=kept, reading=reading
    )
    return merged.mul_(scale)


def dare_ties(
    task_vectors: Tensor,
    *,
    density: Shares = 0.5,
    scale: float = 1.0,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Drop at random instead of trimming, then merge as TIES does (Yu et al. 2023, arXiv 2311.03099).

    Dropped entries do not vote; the sign is elected among the rescaled rest, and those that agree are
    averaged. `reading="mergekit"` rescales and draws as in `dare_linear` and elects and divides as in `ties`;
    and mergekit adds those that agree unless told to normalise.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1]; the paper's drop rate is 1 - density. One
            number, or one for each expert.
        scale: factor on the merged task vector, mergekit's `lambda`.
        seed: of the drawing, as in `dare_linear`.
        weights: a factor on each expert, before the election; all 1 if None.
        normalize: whether those that agree are averaged or added; None averages, and adds in mergekit's
            reading.
        rescale: False leaves what is kept as it is.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    kept = _thinned(task_vectors, density, seed, reading, rescale=rescale is not False)
    averaged = normalize if normalize is not None else reading == PAPER
    merged = combine(
        task_vectors, elect=True, normalize=averaged, weights=weights, kept=kept, reading=reading
    )
    return merged.mul_(scale)


def _thinned(task_vectors: Tensor, density: Shares, seed: int, reading: str, *, rescale: bool) -> Kept:
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


LINEAR_METHOD = Method(
    name="dare_linear",
    function=dare_linear,
    parameters=(
        _DENSITY,
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
        _SEED,
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        READING,
    ),
    paper=_PAPER,
    summary="drop entries at random, rescale the rest, add",
)

TIES_METHOD = Method(
    name="dare_ties",
    function=dare_ties,
    parameters=(
        _DENSITY,
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        _SEED,
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        READING,
    ),
    paper=_PAPER,
    summary="drop entries at random, rescale the rest, merge as TIES does",
)
