"""DELLA: drop at random, small entries more often, then merge as TIES does."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Kept, in_blocks
from selfdev.algorithms.library.sign_election import combine
from selfdev.algorithms.library.specification import (
    MERGEKIT,
    NORMALIZE,
    PAPER,
    READING,
    RESCALE,
    SEED,
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
from selfdev.errors import UserError

# A keep probability near zero would scale a surviving entry without bound.
_RAREST = 0.01

# Entries of each expert that are ranked and drawn at a time.
_BLOCK = 1 << 17


def della(
    task_vectors: Tensor,
    *,
    density: Shares = 0.5,
    epsilon: Shares = 0.2,
    scale: float = 1.0,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    elect: bool = True,
    reading: str = PAPER,
) -> Tensor:
    """Drop small entries more often than large ones, then merge as TIES (Deep et al. 2024, arXiv 2406.11617).

    The entry with rank r by magnitude in its row (0 the largest, n entries in a row) is kept with
    probability density + epsilon / 2 - epsilon r / n, limited to [0.01, 1], and divided by it. Then as TIES
    without trimming.

    mergekit's epsilon is half as large: its probabilities fall evenly from density + epsilon to density -
    epsilon, both of which must lie in (0, 1), and a density of 1 keeps everything. It scales what is left of
    an expert to the L1 norm that it had before, instead of dividing by the probabilities, and elects and
    divides as its TIES does. `reading="mergekit"` gives all that, its epsilon and its drawing from the same
    seed. A row is the last dimension; in mergekit's reading it is the second one of a tensor that has more
    than two.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: mean probability with which an entry is kept, in (0, 1]. One number, or one for each expert.
        epsilon: difference of the probabilities between the largest and the smallest entry of a row, at least 0;
            beyond 2 min(density - 0.01, 1 - density) the limits cut it. Half of it in mergekit's reading, there of any
            sign and in magnitude below min(density, 1 - density) unless the density is 1. One number, or one for each
            expert.
        scale: factor on the merged task vector, mergekit's `lambda`; any number.
        seed: of the drawing, a whole number in [0, 2^64); give each tensor of a model a seed of its own.
        weights: a factor on each expert, before the election, any numbers; all 1 if None.
        normalize: whether those that take part are averaged or added; None averages, and adds without an
            election.
        rescale: whether what is kept makes up for what was dropped; None, as True, does.
        elect: whether a sign is elected; False is what mergekit calls `della_linear`.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).

    Raises:
        UserError: a density out of range, or an epsilon: below 0, or in mergekit's reading too large for the density.
    """
    check_density(density)
    if reading != MERGEKIT and any(each < 0 for each in for_each(epsilon, len(task_vectors))):
        raise UserError(
            f"epsilon {epsilon}: large entries would be dropped more often; give a number of at least 0"
        )
    experts = len(task_vectors)
    spreads = list(zip(for_each(density, experts), for_each(epsilon, experts), strict=True))
    averaged = normalize if normalize is not None else elect
    add = partial(combine, elect=elect, normalize=averaged, weights=weights, reading=reading)
    if reading == MERGEKIT:
        kept = _thinned_by_mergekit(task_vectors, spreads, seed, rescale=rescale is not False)
        return add(task_vectors, kept=kept).mul_(scale)

    # By blocks of rows, although the drawing goes expert by expert: what is thinned is never there as a whole.
    stack = task_vectors.reshape(experts, -1, task_vectors.shape[-1] if task_vectors.dim() > 1 else 1)
    merged = torch.empty_like(stack[0])
    streams = _streams(seed, experts, merged.numel())
    for rows in in_blocks(len(merged), _rows_of(merged)):
        merged[rows] = add(_thinned(stack[:, rows], spreads, streams, rescale=rescale is not False))
    return merged.reshape(task_vectors.shape[1:]).mul_(scale)


def _rows_of(matrix: Tensor) -> int:
    """How many rows are drawn at a time."""
    return max(1, _BLOCK // max(1, matrix[0].numel()))


def _streams(seed: int, experts: int, entries: int) -> list[torch.Generator]:
    """Give each expert a generator that stands where one for all would stand when it comes to it."""
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.Generator() for _ in range(experts)]
    for expert, stream in enumerate(streams):
        for block in in_blocks(entries if expert else 0, _BLOCK):  # what the one before draws
            torch.rand(block.stop - block.start, generator=generator, dtype=torch.float32)
        stream.set_state(generator.get_state())
    return streams


def _thinned(
    stack: Tensor, spreads: list[tuple[float, float]], streams: list[torch.Generator], *, rescale: bool
) -> Tensor:
    kept = stack.new_empty(stack.shape)
    for rows, (density, epsilon), stream, out in zip(stack, spreads, streams, kept, strict=True):
        entries = rows.shape[-1]
        falling = density + epsilon / 2 - epsilon * torch.arange(entries, dtype=torch.float32) / entries
        falling = falling.clamp_(_RAREST, 1.0).to(rows.device)
        # Scattering them to where the ranks came from is a second argsort without sorting.
        chances = torch.empty_like(out).scatter_(-1, _order(rows), falling.expand(rows.shape))
        # Drawn in float32 on the CPU, whatever torch's defaults: the drawing is the same everywhere.
        uniform = torch.rand(rows.shape, generator=stream, dtype=torch.float32).to(rows.device)
        torch.mul(rows, uniform < chances, out=out)
        if rescale:
            out.div_(chances)
    return kept


def _order(rows: Tensor) -> Tensor:
    """Return the places in each row, that of the largest magnitude first; equal ones keep their order.

    A stable argsort, but several times as fast: NumPy sorts numbers by vector instructions, and these hold the bits of
    a magnitude, which order as it does, above its place.
    """
    bits = rows.abs().view(torch.int32).to(torch.int64)
    keys = bits.neg_().bitwise_left_shift_(32).add_(torch.arange(rows.shape[-1], device=rows.device))
    places = torch.from_numpy(np.sort(keys.numpy(force=True), axis=-1)).bitwise_and_(2**32 - 1)
    return places.to(rows.device)


def _thinned_by_mergekit(
    task_vectors: Tensor, spreads: list[tuple[float, float]], seed: int, *, rescale: bool
) -> Kept:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.ones(task_vectors.shape, dtype=torch.bool)
    for expert, (density, epsilon), mask in zip(task_vectors, spreads, masks, strict=True):
        if density == 1.0:
            continue
        if not (density - abs(epsilon) > 0.0 and density + abs(epsilon) < 1.0):
            raise UserError(
                f"epsilon {epsilon} with density {density}: in mergekit's reading density - epsilon and density + "
                "epsilon are probabilities in (0, 1); give a smaller epsilon"
            )
        whole, marked = (each.reshape(1, -1) if each.dim() < 2 else each for each in (expert, mask))
        for rows in in_blocks(len(whole), _rows_of(whole)):
            chances = density - epsilon + 2.0 * epsilon * _mergekits_ranks(whole[rows])
            marked[rows] = torch.bernoulli(chances, generator=generator).bool()
    masks = masks.reshape(len(masks), -1)
    return masked(masks, list(map(growth, task_vectors, masks)) if rescale else ())


def _mergekits_ranks(rows: Tensor) -> Tensor:
    """Return the rank of each magnitude along the second dimension, from 0 to 1, as float32."""
    # mergekit's sort is not stable, and which of equal magnitudes comes first is its own affair.
    order = rows.abs().argsort(dim=1)
    places = [1] * rows.dim()
    places[1] = rows.shape[1]
    numbers = torch.arange(rows.shape[1], dtype=torch.float32).reshape(places).expand(rows.shape)
    ranks = torch.empty_like(rows, dtype=torch.float32).scatter_(1, order, numbers)
    return ranks / max(1, rows.shape[1] - 1)


METHOD = Method(
    name="della",
    function=della,
    parameters=(
        Parameter("density", default=0.5, low=0.1, high=0.95, broadcast=True),
        Parameter("epsilon", default=0.2, low=0.0, high=0.4, broadcast=True),
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        SEED,
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        Parameter("elect", default=True, choices=(True, False)),
        READING,
    ),
    paper=Paper("Deep et al.", 2024, "2406.11617"),
    summary="drop entries at random, small ones more often, merge as TIES does",
)
