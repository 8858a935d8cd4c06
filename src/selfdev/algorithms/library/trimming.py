"""Which entries of a task vector are kept: the largest, a middle band, or those that a mask marks."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import hardshrink

from selfdev.algorithms.library.blocks import Kept, Stack, in_blocks
from selfdev.errors import UserError

Shares = float | Sequence[float]
"""One number for all experts, or one for each."""

_Numbers = NDArray[np.float32]

# Entries from which on a rank is looked for by a sample: of n entries it takes one in n^(1/3). The bracket reaches
# so many standard deviations to both sides of where the sample expects it. Outside of it lies one case in two
# thousand, in which the row is selected from as a whole.
_MANY = 1 << 17
_DEVIATIONS = 3.5
_BRACKETED = 1 << 17

# Numbers of a sample that are taken at a time.
_DRAWN = 1 << 13

# Entries that are added up at a time, few enough for one thread.
_BLOCK = 1 << 14

# A task vector smaller than this in the L1 norm is not rescaled: mergekit's bound.
_NO_LENGTH = 1e-7


def check_density(density: Shares) -> None:
    """Raise UserError unless `density` is a share in (0, 1], or a list of such."""
    for each in density if isinstance(density, Sequence) else [density]:
        if not 0.0 < each <= 1.0:
            raise UserError(f"density {each}: it is the share of entries kept; give a number in (0, 1]")


def for_each(share: Shares, experts: int) -> list[float]:
    """Return a share for each expert."""
    return list(share) if isinstance(share, Sequence) else [share] * experts


def kept_count(density: float, entries: int) -> int:
    """Return how many entries a share of them is, at least one."""
    return max(1, int(density * entries))


def smallest(values: Tensor, rank: int) -> Tensor:
    """Return the value of a rank, 1 that of the smallest, without sorting.

    Args:
        values: shape (entries,), float32, on any device.
        rank: in 1 to the number of entries.

    Returns:
        Shape (), on the same device.
    """
    [[found]] = _ranked(Stack.of(values[None]), [[rank]], lambda part: part)
    return values.new_tensor(found)


def magnitudes_at(ranks: Sequence[Sequence[int]], stack: Stack) -> Tensor:
    """Return the magnitudes that have certain ranks in their expert, 1 that of the smallest.

    Args:
        ranks: for each expert as many.
        stack: the task vectors.

    Returns:
        Shape (experts, ranks), float32.
    """
    return torch.tensor(_ranked(stack, ranks, np.abs), dtype=torch.float32)


def _ranked(
    stack: Stack, ranks: Sequence[Sequence[int]], of: Callable[[_Numbers], _Numbers]
) -> list[list[float]]:
    """The numbers that have certain ranks in their row, among what a function makes of the stack's.

    Of many a sample tells between which two the one in question almost surely lies; then only the few in between are
    looked at closely. NumPy selects with vector instructions, ten times as fast as torch.kthvalue, which moves 64-bit
    indices about. Which number has a rank does not depend on how it is found.
    """

    def look(entries: slice) -> _Numbers:
        return of(stack.part(entries).numpy(force=True))

    def whole(row: int) -> _Numbers:
        return np.concatenate([look(span)[row] for span in in_blocks(stack.entries, _BRACKETED)])

    if stack.entries < _MANY:
        numbers = look(slice(0, stack.entries))
        return [[_at(row, rank) for rank in its] for row, its in zip(numbers, ranks, strict=True)]
    found = _ranked_by_sample(look, stack.entries, ranks)
    return [
        [_at(whole(row), rank) if number is None else number for number, rank in zip(*both, strict=True)]
        for row, both in enumerate(zip(found, ranks, strict=True))
    ]


def _at(numbers: _Numbers, rank: int) -> float:
    return float(np.partition(numbers, rank - 1)[rank - 1])


def _ranked_by_sample(
    look: Callable[[slice], _Numbers], entries: int, ranks: Sequence[Sequence[int]]
) -> list[list[float | None]]:
    """The same; None where the sample misleads."""
    # An odd stride, or all of the sample could come from a few columns of a matrix.
    stride = int(entries ** (1 / 3)) | 1
    drawn = [look(slice(part.start, part.stop, stride)) for part in in_blocks(entries, _DRAWN * stride)]
    rows = zip(np.concatenate(drawn, axis=1), ranks, strict=True)
    ends = [[_ends(sample, rank, entries) for rank in its] for sample, its in rows]
    spans = list(in_blocks(entries, _BRACKETED))

    def sort_out(share: Sequence[slice]) -> list[list["_Bracket"]]:
        own = [[_Bracket(*both) for both in its] for its in ends]
        for span in share:
            for row, its in zip(look(span), own, strict=True):
                for bracket in its:
                    bracket.take(row)
        return own

    threads = torch.get_num_threads()  # NumPy itself has but one
    if threads == 1:
        shares = [sort_out(spans)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            shares = list(pool.map(sort_out, [spans[i::threads] for i in range(threads)]))
    return [
        [_Bracket.together(each).at(rank) for rank, *each in zip(its, *brackets, strict=True)]
        for its, *brackets in zip(ranks, *shares, strict=True)
    ]


def _ends(sample: _Numbers, rank: int, entries: int) -> tuple[float, float]:
    """Two numbers between which almost surely lies the one that has a rank among all of which these are a sample."""
    share = rank / entries
    place = share * len(sample)
    margin = _DEVIATIONS * (place * (1 - share)) ** 0.5 + 1
    low, high = int(place - margin), int(place + margin)
    inside = sorted({max(low, 0), min(high, len(sample) - 1)})
    found = np.partition(sample, inside)[inside]
    # What is beyond the sample may lie beyond all of it.
    return (
        float(found[0]) if low > 0 else -math.inf,
        float(found[-1]) if high < len(sample) - 1 else math.inf,
    )


@dataclass
class _Bracket:
    """How many numbers of a row lie where between two of them, and which are in between."""

    low: float
    high: float
    below: int = 0
    at_low: int = 0
    at_high: int = 0
    between: list[_Numbers] = field(default_factory=list)

    @classmethod
    def together(cls, brackets: Sequence["_Bracket"]) -> "_Bracket":
        """What several have sorted out that have the same ends."""
        return cls(
            brackets[0].low,
            brackets[0].high,
            sum(each.below for each in brackets),
            sum(each.at_low for each in brackets),
            sum(each.at_high for each in brackets),
            [some for each in brackets for some in each.between],
        )

    def take(self, row: _Numbers) -> None:
        """Sort out some numbers."""
        above = row > self.low
        at_most = len(row) - int(np.count_nonzero(above))
        below = int(np.count_nonzero(row < self.low))
        self.below += below
        # Where numbers are few, as differences of bfloat16 weights are, the one in question is often an end.
        self.at_low += at_most - below
        if self.high > self.low:
            self.at_high += int(np.count_nonzero(row == self.high))
        above &= row < self.high
        self.between.append(np.compress(above, row))  # the slowest step by far, if many were left

    def at(self, rank: int) -> float | None:
        """The number of a rank; None where it is outside."""
        left = rank - self.below
        if left <= 0:
            return None
        if left <= self.at_low:
            return self.low
        left -= self.at_low
        inside = np.concatenate(self.between)
        if left <= len(inside):
            return _at(inside, left)
        return self.high if left <= len(inside) + self.at_high else None


def thresholds(scores: Tensor, density: Shares) -> Tensor:
    """Return what the `density` share of entries with the highest scores reaches, at least one entry.

    Entries equal to the last one of them reach it too, so that the order of equal entries cannot matter.

    Args:
        scores: shape (rows, *entries), float32.
        density: share of the entries of each row, in (0, 1].

    Returns:
        One threshold for each row, shape (rows, 1).
    """
    check_density(density)
    found = []
    for row, share in zip(scores, for_each(density, len(scores)), strict=True):
        flat = row.reshape(-1)
        found.append(smallest(flat, _first_kept(share, len(flat))))
    return torch.stack(found)[:, None]


def magnitude_thresholds(stack: Stack, density: Shares) -> Tensor:
    """Return the thresholds of the magnitudes, shape (experts, 1)."""
    check_density(density)
    shares = for_each(density, stack.experts)
    return magnitudes_at([[_first_kept(share, stack.entries)] for share in shares], stack)


def band(least: Tensor, most: Tensor | None = None) -> Kept:
    """Keep what lies between two magnitudes of its expert, themselves included.

    Args:
        least: shape (experts, 1).
        most: the same; no bound if None.
    """
    # Shrinking at the next smaller number keeps what reaches `least`, in one pass instead of three.
    cuts = torch.nextafter(least, least.new_tensor(-1.0)).flatten().tolist()
    bounds = [] if most is None else most.flatten().tolist()

    def kept(block: Tensor, _: slice) -> Tensor:
        own = torch.empty_like(block, memory_format=torch.contiguous_format)
        for row, cut, out in zip(block, cuts, own, strict=True):
            torch.hardshrink(row, cut, out=out)
        for row, bound, out in zip(block, bounds, own, strict=False):
            out.sub_(hardshrink(row, bound))  # which leaves what exceeds the bound
        return own

    return kept


def _first_kept(density: float, entries: int) -> int:
    """The rank of the smallest value that a share of the largest reaches, from 1."""
    return entries - kept_count(density, entries) + 1


def largest(scores: Tensor, density: Shares) -> Tensor:
    """Mark the entries that reach the `thresholds`, as a boolean mask of the same shape."""
    flat = scores.reshape(len(scores), -1)
    return (flat >= thresholds(scores, density)).reshape(scores.shape)


def exactly(count: int, scores: Tensor, *, largest: bool) -> Tensor | None:
    """Mark exactly so many of the largest or smallest entries, if no equal ones leave open which.

    Args:
        count: how many; none if it is not positive.
        scores: shape (entries,), float32.
        largest: the largest, else the smallest.

    Returns:
        A boolean mask of the same shape, or None.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = smallest(scores, len(scores) - count + 1 if largest else count)
    marked = scores >= threshold if largest else scores <= threshold
    return marked if int(torch.count_nonzero(marked)) == count else None


def marked_at(places: Tensor, scores: Tensor) -> Tensor:
    """Mark the entries at these places: a boolean mask of the shape of the scores, (entries,)."""
    marked = torch.zeros_like(scores, dtype=torch.bool)
    marked[places] = True
    return marked


def masked(masks: Tensor, factors: Sequence[float] = ()) -> Kept:
    """Keep what masks mark.

    Args:
        masks: shape (experts, entries), boolean.
        factors: of what is kept of each expert; none if empty.
    """
    grown = torch.tensor(factors, dtype=torch.float32, device=masks.device)[:, None]

    def kept(block: Tensor, entries: slice) -> Tensor:
        own = block * masks[:, entries]
        return own.mul_(grown) if len(grown) else own

    return kept


def growth(whole: Tensor, mask: Tensor) -> float:
    """Return the factor that brings what a mask keeps to the L1 norm of the whole; 1 if either is next to zero.

    Args:
        whole: shape (*parameter).
        mask: boolean, with as many entries.
    """
    before = after = 0.0
    # In blocks that torch adds up in one thread: the order of a sum must not depend on how many there are.
    for block, kept in zip(whole.reshape(-1).split(_BLOCK), mask.reshape(-1).split(_BLOCK), strict=True):
        magnitudes = block.abs()
        before += magnitudes.sum(dtype=torch.float64).item()
        after += magnitudes.mul_(kept).sum(dtype=torch.float64).item()
    return 1.0 if min(before, after) < _NO_LENGTH else before / after
