"""Model Breadcrumbs: neither the largest entries nor the small ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Kept, Stack
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
    band,
    check_density,
    exactly,
    for_each,
    growth,
    magnitudes_at,
    marked_at,
    masked,
    smallest,
)
from selfdev.errors import UserError


def breadcrumbs(
    task_vectors: Tensor,
    *,
    density: Shares = 0.9,
    outliers: Shares = 0.01,
    scale: float = 0.3,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    elect: bool = False,
    reading: str = PAPER,
) -> Tensor:
    """Drop the largest and the smallest entries of each expert, then add (arXiv 2312.06795).

    Davari and Belilovsky 2023, "Model Breadcrumbs". Of each task vector the `outliers` share of largest
    magnitudes is dropped, and of the rest the largest are kept until a `density` share of all entries stands.
    Entries equal to the last one kept, at either end, are kept too.

    mergekit holds to the density where density + outliers exceeds 1, and drops fewer outliers, none at all at
    density 1; here the outliers go, and fewer entries remain. A density below one entry leaves nothing there,
    and one entry here. Of magnitudes equal to the last one kept mergekit keeps so many as the density says,
    whichever its sort brings up.
    `reading="mergekit"` gives all that.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries kept, in (0, 1]. One number, or one for each expert.
        outliers: share of the entries dropped as too large, in [0, 1), mergekit's `gamma`. One number, or one
            for each expert.
        scale: factor on the sum, mergekit's `lambda`; any number.
        weights: a factor on each expert, any numbers; all 1 if None.
        normalize: whether the sum is divided; None, as False, does not.
        rescale: whether what is kept of an expert is brought to the L1 norm of the whole; None, as False, does not.
        elect: whether a sign is elected before the sum: what mergekit calls `breadcrumbs_ties`.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    shares = _shares(density, outliers, len(task_vectors))
    if reading == MERGEKIT or rescale:
        marked = _mergekits_band if reading == MERGEKIT else _band
        rows = zip(task_vectors, shares, strict=True)
        masks = torch.stack([marked(row.reshape(-1).abs(), *each) for row, each in rows])
        kept = masked(masks, list(map(growth, task_vectors, masks)) if rescale else ())
    else:
        kept = _kept(Stack.of(task_vectors), shares)
    merged = combine(
        task_vectors, elect=elect, normalize=normalize is True, weights=weights, kept=kept, reading=reading
    )
    return merged.mul_(scale)


def _by_parts(
    stack: Stack,
    *,
    density: Shares,
    outliers: Shares,
    scale: float,
    weights: Sequence[float] | None,
    normalize: bool | None,
    elect: bool,
    **_: object,
) -> Callable[[Tensor], Tensor]:
    """What merges parts of a tensor of which it is known what is kept."""
    kept = _kept(stack, _shares(density, outliers, stack.experts))
    return lambda part: combine(
        part, elect=elect, normalize=normalize is True, weights=weights, kept=kept
    ).mul_(scale)


def _shares(density: Shares, outliers: Shares, experts: int) -> list[tuple[float, float]]:
    """Density and outliers of each expert."""
    check_density(density)
    shares = list(zip(for_each(density, experts), for_each(outliers, experts), strict=True))
    for _, top in shares:
        if not 0.0 <= top < 1.0:
            raise UserError(f"outliers {top}: it is the share of entries dropped; give a number in [0, 1)")
    return shares


def _kept(stack: Stack, shares: Sequence[tuple[float, float]]) -> Kept:
    least, most = magnitudes_at([_ranks(stack.entries, *each) for each in shares], stack).split(1, dim=1)
    return band(least, most)


def _ranks(entries: int, density: float, outliers: float) -> tuple[int, int]:
    """The ranks of the smallest and of the largest magnitude kept, from 1."""
    last = max(1, entries - int(outliers * entries))
    return max(1, last - max(1, int(density * entries)) + 1), last


def _band(magnitudes: Tensor, density: float, outliers: float) -> Tensor:
    first, last = _ranks(len(magnitudes), density, outliers)
    return (magnitudes >= smallest(magnitudes, first)) & (magnitudes <= smallest(magnitudes, last))


def _mergekits_band(magnitudes: Tensor, density: float, outliers: float) -> Tensor:
    if density == 1.0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    entries = len(magnitudes)
    kept = int(density * entries)
    below = max(0, entries - kept - int(outliers * entries))
    upper = exactly(below + kept, magnitudes, largest=False)
    lower = exactly(below, magnitudes, largest=False)
    if upper is None or lower is None:  # mergekit's own sort decides, which is not stable
        return marked_at(magnitudes.sort().indices[below : below + kept], magnitudes)
    return upper & ~lower


METHOD = Method(
    name="breadcrumbs",
    function=breadcrumbs,
    parameters=(
        Parameter("density", default=0.9, low=0.1, high=1.0, broadcast=True),
        Parameter("outliers", default=0.01, low=0.0, high=0.2, broadcast=True),
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        Parameter("elect", default=False, choices=(True, False)),
        READING,
    ),
    paper=Paper("Davari and Belilovsky", 2023, "2312.06795"),
    summary="drop the largest and the smallest entries, add the rest",
    by_parts=_by_parts,
)
