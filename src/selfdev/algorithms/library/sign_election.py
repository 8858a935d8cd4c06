"""One sign for each entry, elected by the experts, and the sum or mean of those that agree with it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from selfdev.algorithms.library.specification import MERGEKIT, PAPER

# Entries of each expert that are merged at a time: what is in between stays in the cache and costs no memory. Smaller
# blocks keep threads waiting for each other.
_BLOCK = 1 << 17

# A sum of weights below this divides nothing: mergekit's bound.
_NO_WEIGHT = 1e-8


def elected_sign(task_vectors: Tensor, zero: float = 0.0) -> Tensor:
    """Return the sign of the sum over experts, shape (*parameter); `zero` where the sum is exactly zero."""
    total = task_vectors.sum(dim=0)
    sign = torch.sign(total)
    return sign if zero == 0.0 else sign.add_(total == 0.0, alpha=zero)


def disjoint_mean(task_vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average at each entry the non-zero values that have the elected sign.

    An entry whose sum is exactly zero has no elected sign, and becomes zero.

    Args:
        task_vectors: shape (experts, *parameter).
        weights: of the average, broadcastable to the task vectors; equal if None.

    Returns:
        Shape (*parameter).
    """
    agrees = (task_vectors * elected_sign(task_vectors) > 0).to(task_vectors.dtype)
    weighted = agrees if weights is None else agrees * weights
    total = weighted.sum(dim=0)
    return (task_vectors * weighted).sum(dim=0) / torch.where(total > 0, total, 1.0)


def combine(
    task_vectors: Tensor,
    *,
    elect: bool,
    normalize: bool,
    weights: Sequence[float] | None = None,
    least: Tensor | None = None,
    reading: str = PAPER,
) -> Tensor:
    """Add task vectors, of which entries may be dropped already, with or without an election of signs.

    The paper's reading counts: a normalised entry is divided by the number of experts that take part in it, and
    where the votes cancel the entry is zero. mergekit weighs: it divides by the sum of the weights of those that
    take part, and where the votes cancel the positive sign is elected.

    Args:
        task_vectors: shape (experts, *parameter).
        elect: whether only the non-zero values with the elected sign take part; else all do.
        normalize: whether the sum is divided.
        weights: a factor on each expert, before the election; all 1 if None.
        least: the magnitude below which an entry of an expert has no part, shape (experts, 1); 0 if None.
        reading: `paper` or `mergekit`.

    Returns:
        Shape (*parameter).
    """
    factors = None if weights is None else task_vectors.new_tensor(weights)[:, None]
    shares = factors if reading == MERGEKIT else None
    whole = float(len(task_vectors)) if shares is None else shares.sum().item()
    whole = 1.0 if abs(whole) < _NO_WEIGHT else whole

    # Shrinking at the next smaller number keeps what reaches `least`, in one pass instead of three.
    cuts = [] if least is None else torch.nextafter(least, least.new_tensor(-1.0)).flatten().tolist()

    def merged(block: Tensor) -> Tensor:
        if cuts:
            block = torch.stack([hardshrink(row, cut) for row, cut in zip(block, cuts, strict=True)])
        weighted = block if factors is None else block * factors
        if not elect:
            total = weighted.sum(dim=0)
            return total / whole if normalize else total
        sign = elected_sign(weighted, zero=1.0 if reading == MERGEKIT else 0.0)
        agreeing = (weighted * sign).clamp_(min=0.0)
        total = agreeing.sum(dim=0).mul_(sign)
        if not normalize:
            return total
        agrees = torch.sign(agreeing)
        divisor = (agrees if shares is None else agrees * shares).sum(dim=0)
        # torch.where would take as long as all that is above.
        return total.div_(divisor.clamp_(min=1.0) if shares is None else divisor.add_(divisor == 0))

    return entrywise(merged, task_vectors)


def entrywise(merge: Callable[[Tensor], Tensor], task_vectors: Tensor) -> Tensor:
    """Merge by a function that sees the experts' values of each entry alone, block by block.

    Args:
        merge: from shape (experts, n) to shape (n,), for any n.
        task_vectors: shape (experts, *parameter).

    Returns:
        Shape (*parameter).
    """
    flat = task_vectors.reshape(len(task_vectors), -1)
    result = flat.new_empty(flat.shape[1])
    for start in range(0, flat.shape[1], _BLOCK):
        result[start : start + _BLOCK] = merge(flat[:, start : start + _BLOCK])
    return result.reshape(task_vectors.shape[1:])
