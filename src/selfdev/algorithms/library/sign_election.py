"""One sign for each entry, elected by the experts, and the sum or mean of those that agree with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Kept, added, blockwise
from selfdev.algorithms.library.specification import MERGEKIT, PAPER

# A sum of weights below this divides nothing: mergekit's bound.
_NO_WEIGHT = 1e-8


def elected_sign(task_vectors: Tensor, zero: float = 0.0) -> Tensor:
    """Return the sign of the sum over experts, shape (*parameter); `zero` where the sum is exactly zero."""
    total = added(task_vectors)
    sign = torch.sign(total)
    return sign if zero == 0.0 else sign.add_(total == 0.0, alpha=zero)


def disjoint_mean(task_vectors: Tensor, weights: Tensor) -> Tensor:
    """Average at each entry the non-zero values that have the elected sign.

    An entry whose sum is exactly zero has no elected sign, and becomes zero.

    Args:
        task_vectors: shape (experts, *parameter).
        weights: of the average, broadcastable to the task vectors.

    Returns:
        Shape (*parameter).
    """
    sign = elected_sign(task_vectors)
    agreeing = (task_vectors * sign).clamp_(min=0.0)
    shares = torch.sign(agreeing).mul_(weights)
    total = shares.sum(dim=0)
    return agreeing.mul_(weights).sum(dim=0).mul_(sign).div_(total.add_(total == 0))


def combine(
    task_vectors: Tensor,
    *,
    elect: bool,
    normalize: bool,
    weights: Sequence[float] | None = None,
    kept: Kept | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Add task vectors, of which entries may be dropped, with or without an election of signs.

    The paper's reading counts: a normalised entry is divided by the number of experts that take part in it, and
    where the votes cancel the entry is zero. mergekit weighs: it divides by the sum of the weights of those that
    take part, and where the votes cancel the positive sign is elected.

    Args:
        task_vectors: shape (experts, *parameter).
        elect: whether only the non-zero values with the elected sign take part; else all do.
        normalize: whether the sum is divided.
        weights: a factor on each expert, before the election; all 1 if None.
        kept: gives what has a part of each block, dropped entries being zero; everything if None.
        reading: `paper` or `mergekit`.

    Returns:
        Shape (*parameter), in memory of its own.
    """
    factors = None if weights is None else task_vectors.new_tensor(weights)[:, None]
    shares = factors if reading == MERGEKIT else None
    whole = float(len(task_vectors)) if shares is None else shares.sum().item()
    whole = 1.0 if abs(whole) < _NO_WEIGHT else whole

    def merged(block: Tensor, entries: slice) -> Tensor:
        # From the first copy on everything happens in its memory.
        own = None if kept is None else kept(block, entries)
        if factors is not None:
            own = block * factors if own is None else own.mul_(factors)
        weighted = block if own is None else own
        if not elect:
            total = added(weighted)
            return total.div_(whole) if normalize else total
        sign = elected_sign(weighted, zero=1.0 if reading == MERGEKIT else 0.0)
        agreeing = torch.empty_like(block) if own is None else own
        for row, out in zip(weighted, agreeing, strict=True):  # one after the other: each stays in the cache
            torch.mul(row, sign, out=out).clamp_(min=0.0)
        total = added(agreeing).mul_(sign)
        if not normalize:
            return total
        agrees = agreeing.sign_()
        divisor = added(agrees if shares is None else agrees.mul_(shares))
        # torch.where would take as long as all that is above.
        return total.div_(divisor.clamp_(min=1.0) if shares is None else divisor.add_(divisor == 0))

    return blockwise(merged, task_vectors)
