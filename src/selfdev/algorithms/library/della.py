"""DELLA: drop at random, small entries more often, then merge as TIES does."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
    keep_by_coin,
    keep_randomly,
)
from selfdev.errors import UserError

# A keep probability near zero would scale a surviving entry without bound.
_RAREST = 0.01


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
        epsilon: difference of the probabilities between the largest and the smallest entry of a row; half of
            it in mergekit's reading. One number, or one for each expert.
        scale: factor on the merged task vector, mergekit's `lambda`.
        seed: of the drawing; give each tensor of a model a seed of its own.
        weights: a factor on each expert, before the election; all 1 if None.
        normalize: whether those that take part are averaged or added; None averages, and adds without an
            election.
        rescale: False leaves what is kept as it is.
        elect: whether a sign is elected; False is what mergekit calls `della_linear`.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).

    Raises:
        UserError: a density out of range, or an epsilon too large for it in mergekit's reading.
    """
    check_density(density)
    experts = len(task_vectors)
    spreads = list(zip(for_each(density, experts), for_each(epsilon, experts), strict=True))
    kept = (
        _thinned_by_mergekit(task_vectors, spreads, seed, rescale=rescale is not False)
        if reading == MERGEKIT
        else _thinned(task_vectors, spreads, seed, rescale=rescale is not False)
    )
    averaged = normalize if normalize is not None else elect
    return scale * combine(kept, elect=elect, normalize=averaged, weights=weights, reading=reading)


def _thinned(task_vectors: Tensor, spreads: list[tuple[float, float]], seed: int, *, rescale: bool) -> Tensor:
    probability = torch.empty_like(task_vectors)
    for expert, (density, epsilon), out in zip(task_vectors, spreads, probability, strict=True):
        rows = expert.reshape(1, -1) if expert.dim() < 2 else expert
        ranks = _ranks(rows, dim=-1, descending=True)
        chances = density + epsilon / 2 - epsilon * ranks / rows.shape[-1]
        out.copy_(chances.clamp(_RAREST, 1.0).reshape(out.shape))
    return keep_randomly(task_vectors, probability, seed, rescale=rescale)


def _thinned_by_mergekit(
    task_vectors: Tensor, spreads: list[tuple[float, float]], seed: int, *, rescale: bool
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = task_vectors.clone()
    for expert, (density, epsilon), out in zip(task_vectors, spreads, kept, strict=True):
        if density == 1.0:
            continue
        if not (density - epsilon > 0.0 and density + epsilon < 1.0):
            raise UserError(
                f"epsilon {epsilon} with density {density}: in mergekit's reading density - epsilon and density + "
                "epsilon are probabilities in (0, 1); give a smaller epsilon"
            )
        rows = expert.reshape(1, -1) if expert.dim() < 2 else expert
        ranks = _ranks(rows, dim=1, descending=False) / max(1, rows.shape[1] - 1)
        chances = density - epsilon + 2.0 * epsilon * ranks
        out.copy_(keep_by_coin(rows, chances, generator, rescale=rescale).reshape(out.shape))
    return kept


def _ranks(values: Tensor, dim: int, *, descending: bool) -> Tensor:
    """Return the rank of each magnitude along a dimension, from 0, as float32."""
    # mergekit's ascending sort is not stable, and which of equal magnitudes comes first is its own affair.
    order = values.abs().argsort(dim=dim, descending=descending, stable=descending)
    places = [1] * values.dim()
    places[dim] = values.shape[dim]
    numbers = torch.arange(values.shape[dim], dtype=torch.float32).reshape(places).expand(values.shape)
    # Scattering the numbers to where they came from is a second argsort without sorting.
    return torch.empty_like(values, dtype=torch.float32).scatter_(dim, order, numbers)


METHOD = Method(
    name="della",
    function=della,
    parameters=(
        Parameter("density", default=0.5, low=0.1, high=0.95, broadcast=True),
        Parameter("epsilon", default=0.2, low=0.0, high=0.4, broadcast=True),
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        Parameter("seed", default=0, low=0, high=2**31 - 1, integer=True, screened=False),
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        Parameter("elect", default=True, choices=(True, False)),
        READING,
    ),
    paper=Paper("Deep et al.", 2024, "2406.11617"),
    summary="drop entries at random, small ones more often, merge as TIES does",
)
