"""DARE with an election of signs: drop entries at random, rescale the rest, merge as TIES does."""

from collections.abc import Sequence

from torch import Tensor

from selfdev.algorithms.library.sign_election import combine
from selfdev.algorithms.library.specification import (
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
from selfdev.algorithms.library.thinning import thinned
from selfdev.algorithms.library.trimming import Shares


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

    What is kept is divided by the density. Dropped entries do not vote; the sign is elected among the rescaled
    rest, and those that agree are averaged. `reading="mergekit"` rescales and draws as in `dare_linear` and elects
    and divides as in `ties`; and mergekit adds those that agree unless told to normalise.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: probability with which an entry is kept, in (0, 1]; the paper's drop rate is 1 - density. One
            number, or one for each expert.
        scale: factor on the merged task vector, mergekit's `lambda`; any number.
        seed: of the drawing, a whole number in [0, 2^64), as in `dare_linear`.
        weights: a factor on each expert, before the election, any numbers; all 1 if None.
        normalize: whether those that agree are averaged or added; None averages, and adds in mergekit's
            reading.
        rescale: whether what is kept makes up for what was dropped; None, as True, does.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    kept = thinned(task_vectors, density, seed, reading, rescale=rescale is not False)
    averaged = normalize if normalize is not None else reading == PAPER
    merged = combine(
        task_vectors, elect=True, normalize=averaged, weights=weights, kept=kept, reading=reading
    )
    return merged.mul_(scale)


METHOD = Method(
    name="dare_ties",
    function=dare_ties,
    parameters=(
        Parameter("density", default=0.5, low=0.1, high=1.0, broadcast=True),
        Parameter("scale", default=1.0, low=0.1, high=4.0, log=True, screened=False),
        SEED,
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        READING,
    ),
    paper=Paper("Yu et al.", 2023, "2311.03099"),
    summary="drop entries at random, rescale the rest, merge as TIES does",
)
