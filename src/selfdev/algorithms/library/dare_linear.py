"""DARE with a plain sum: drop entries at random, rescale the rest, add."""

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
        scale: factor on the sum, mergekit's `lambda`; any number.
        seed: of the drawing, a whole number in [0, 2^64). Tensors of one shape get the same drawing from the same
            seed: give each tensor of a model a seed of its own.
        weights: a factor on each expert, any numbers; all 1 if None.
        normalize: whether the sum is divided; None, as False, does not.
        rescale: whether what is kept makes up for what was dropped; None, as True, does.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    kept = thinned(task_vectors, density, seed, reading, rescale=rescale is not False)
    merged = combine(
        task_vectors, elect=False, normalize=normalize is True, weights=weights, kept=kept, reading=reading
    )
    return merged.mul_(scale)


METHOD = Method(
    name="dare_linear",
    function=dare_linear,
    parameters=(
        Parameter("density", default=0.5, low=0.1, high=1.0, broadcast=True),
        Parameter("scale", default=0.3, low=0.1, high=1.5, screened=False),
        SEED,
        WEIGHTS,
        NORMALIZE,
        RESCALE,
        READING,
    ),
    paper=Paper("Yu et al.", 2023, "2311.03099"),
    summary="drop entries at random, rescale the rest, add",
)
