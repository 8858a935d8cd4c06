"""Work on blocks of entries: what is in between stays in the cache, and takes next to no memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

Kept = Callable[[Tensor, slice], Tensor]
"""Gives what has a part of a block of entries, shape (experts, n), and their slice: in memory of its own."""


@dataclass(frozen=True)
class Stack:
    """Stacked task vectors that are looked at a part at a time, and so need not lie in memory.

    Attributes:
        experts: how many.
        entries: how many each of them has.
        part: gives what lies at a slice of them, which may have a step: shape (experts, n), float32. It may be a view.
    """

    experts: int
    entries: int
    part: Callable[[slice], Tensor]

    @classmethod
    def of(cls, task_vectors: Tensor) -> "Stack":
        """Those that lie in memory, shape (experts, *parameter)."""
        flat = task_vectors.reshape(len(task_vectors), -1)
        return cls(len(flat), flat.shape[1], lambda entries: flat[:, entries])


# Entries of each expert that are merged at a time. Smaller blocks keep several threads waiting for each other.
_BLOCK = 1 << 17


# A block of fewer entries is none of its own: torch adds up the rows of a narrow one in another order.
_NARROW = 64


def in_blocks(length: int, size: int) -> Iterator[slice]:
    """Give slices of `size` that cover so many; the last one takes a narrow rest, and so may have a few more."""
    starts = range(0, max(length - _NARROW, 1), size)
    return (slice(start, length if start == starts[-1] else start + size) for start in starts if length)


def added(rows: Tensor) -> Tensor:
    """The sum of the experts' rows, one after the other.

    It takes half as long as torch's own sum over a first dimension, and gives the same bits in blocks of any width.

    Args:
        rows: shape (experts, *entries), at least one expert.

    Returns:
        Shape (*entries), in memory of its own.
    """
    if len(rows) == 1:
        return rows[0].clone()
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total.add_(row)
    return total


def entrywise(merge: Callable[[Tensor], Tensor], task_vectors: Tensor) -> Tensor:
    """Merge by a function that sees the experts' values of each entry alone, block by block.

    Args:
        merge: from shape (experts, n) to shape (n,), for any n.
        task_vectors: shape (experts, *parameter).

    Returns:
        Shape (*parameter), in memory of its own.
    """
    return blockwise(lambda block, _: merge(block), task_vectors)


def blockwise(merge: Callable[[Tensor, slice], Tensor], task_vectors: Tensor) -> Tensor:
    """The same by a function that is told as well which entries a block has, as their slice."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    count = flat.shape[1]
    if count <= _BLOCK:
        return merge(flat, slice(0, count)).reshape(task_vectors.shape[1:])
    result = flat.new_empty(count)
    for entries in in_blocks(count, _BLOCK):
        result[entries] = merge(flat[:, entries], entries)
    return result.reshape(task_vectors.shape[1:])
