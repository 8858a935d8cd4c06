"""TIES: trim, elect a sign, merge those that agree."""

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
    kept_count,
    largest,
    magnitude_thresholds,
    marked_at,
    masked,
)


def ties(
    task_vectors: Tensor,
    *,
    density: Shares = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Trim, elect a sign, and average those that agree (Yadav et al. 2023, arXiv 2306.01708).

    The trimmed task vectors keep their largest entries by magnitude; the elected sign of an entry is that of
    the sum of the trimmed values; the merged value is the mean of the non-zero ones with that sign. The paper
    trims over the whole model at once, here each tensor is trimmed on its own.

    mergekit does so too, and differs in three points, which `reading="mergekit"` gives. It divides by the sum
    of the weights of those that agree instead of their number, so that equal weights change nothing. Where
    the votes cancel it elects the positive sign, and this reading leaves the entry zero. Of magnitudes equal
    to the threshold it keeps so many as the density says, whichever its sort brings up, and this reading
    keeps all. mergekit's is the slower one: where magnitudes are equal it has to sort as mergekit does.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of each task vector's entries kept, by magnitude; in (0, 1]. One number, or one for
            each expert.
        scale: factor on the merged task vector, mergekit's `lambda`, any number; the paper searches 0.8 to 3.
        weights: a factor on each trimmed task vector, before the election, any numbers; all 1 if None.
        normalize: whether those that agree are averaged (True, as is None) or added.
        rescale: whether each trimmed task vector is brought to the L1 norm that it had before; None, as False, does
            not.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if reading != MERGEKIT and not rescale:
        kept = band(magnitude_thresholds(Stack.of(task_vectors), density))
    else:
        check_density(density)
        kept = _marked(task_vectors, for_each(density, len(task_vectors)), reading, rescale=rescale is True)
    return _elected(task_vectors, kept, scale, weights, normalize, reading)


def _by_parts(
    stack: Stack,
    *,
    density: Shares,
    scale: float,
    weights: Sequence[float] | None,
    normalize: bool | None,
    **_: object,
) -> Callable[[Tensor], Tensor]:
    """What merges parts of a tensor whose thresholds have been found."""
    kept = band(magnitude_thresholds(stack, density))
    return lambda part: _elected(part, kept, scale, weights, normalize, PAPER)


def _elected(
    task_vectors: Tensor,
    kept: Kept,
    scale: float,
    weights: Sequence[float] | None,
    normalize: bool | None,
    reading: str,
) -> Tensor:
    """Merge what is kept of the task vectors."""
    merged = combine(
        task_vectors,
        elect=True,
        normalize=normalize is not False,
        weights=weights,
        kept=kept,
        reading=reading,
    )
    return merged.mul_(scale)


def _marked(task_vectors: Tensor, density: list[float], reading: str, *, rescale: bool) -> Kept:
    masks = torch.empty(len(task_vectors), task_vectors[0].numel(), dtype=torch.bool)
    for row, share, mask in zip(task_vectors, density, masks, strict=True):
        magnitudes = row.reshape(-1).abs()
        mask.copy_(
            _kept_by_mergekit(magnitudes, share)
            if reading == MERGEKIT
            else largest(magnitudes[None], share)[0]
        )
    return masked(masks, list(map(growth, task_vectors, masks)) if rescale else ())


def _kept_by_mergekit(magnitudes: Tensor, density: float) -> Tensor:
    count = kept_count(density, len(magnitudes))
    kept = exactly(count, magnitudes, largest=True)
    if kept is None:  # mergekit's own sort decides, which is not stable
        kept = marked_at(magnitudes.argsort(descending=True)[:count], magnitudes)
    return kept


METHOD = Method(
    name="ties",
    function=ties,
    parameters=(
        Parameter("density", default=0.2, low=0.1, high=1.0, broadcast=True),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        READING,
    ),
    paper=Paper("Yadav et al.", 2023, "2306.01708"),
    summary="trim small entries, elect a sign, average the values that agree",
    by_parts=_by_parts,
)
