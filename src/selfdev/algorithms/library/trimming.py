"""Which entries of a task vector are kept: the largest, a middle band, or those that a mask marks."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import hardshrink

from selfdev.algorithms.library.blocks import Kept
from selfdev.errors import UserError

Shares = float | Sequence[float]
"""One number for all experts, or one for each."""

# Entries from which on a rank is looked for by a sample: of n entries it takes one in n^(1/3) / 4. The bracket reaches
# so many standard deviations to both sides of where the sample expects it. Outside of it lies one case in two
# thousand, which costs time alone.
_MANY = 1 << 17
_SAMPLED = 0.25
_DEVIATIONS = 3.5
_BRACKETED = 1 << 16

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


def smallest(values: Tensor, rank: int, *, of_magnitudes: bool = False) -> Tensor:
    """Return the value of a rank, 1 that of the smallest, without sorting.

    Of many values a sample tells between which two the one in question almost surely lies; then only the few in
    between are looked at closely. NumPy selects with vector instructions, ten times as fast as torch.kthvalue, which
    moves 64-bit indices about. Which value has a rank does not depend on how it is found.

    Args:
        values: shape (entries,), float32, on any device.
        rank: in 1 to the number of entries.
        of_magnitudes: whether the magnitudes are ranked instead of the values.

    Returns:
        Shape (), on the same device.
    """
    array = values.numpy(force=True)
    found = _found_by_sample(array, rank, of_magnitudes) if len(array) >= _MANY else None
    if found is None:
        found = np.partition(np.abs(array) if of_magnitudes else array, rank - 1)[rank - 1]
    return values.new_tensor(found)


def _found_by_sample(array: NDArray[Any], rank: int, of_magnitudes: bool) -> Any:
    """The value of a rank, or None where the sample misleads."""
    # An odd stride, or all of the sample could come from a few columns of a matrix.
    sample = array[:: int(_SAMPLED * len(array) ** (1 / 3)) | 1]
    sample = np.abs(sample) if of_magnitudes else sample
    share = rank / len(array)
    place = share * len(sample)
    margin = _DEVIATIONS * (place * (1 - share)) ** 0.5 + 1
    ends = [max(0, int(place - margin)), min(len(sample) - 1, int(place + margin))]
    low, high = np.partition(sample, ends)[ends]
    above, between = 0, []
    for block in _blocks(array, of_magnitudes):
        over = block > low
        above += int(np.count_nonzero(over))
        over &= block < high
        between.append(block[over])  # the slowest step by far, if many were left
    inside = np.concatenate(between)
    left = rank - (len(array) - above)
    if 0 < left <= len(inside):
        return np.partition(inside, left - 1)[left - 1]
    # Where values are few, as differences of bfloat16 weights are, it is often an end of the bracket.
    end = low if left <= 0 else high
    below = sum(int(np.count_nonzero(block < end)) for block in _blocks(array, of_magnitudes))
    equal = sum(int(np.count_nonzero(block == end)) for block in _blocks(array, of_magnitudes))
    return end if below < rank <= below + equal else None


def _blocks(array: NDArray[Any], of_magnitudes: bool) -> Iterator[NDArray[Any]]:
    """Its values or magnitudes, each block gone when the next one comes."""
    magnitudes = np.empty(_BRACKETED, array.dtype)
    for start in range(0, len(array), _BRACKETED):
        block = array[start : start + _BRACKETED]
        yield np.abs(block, out=magnitudes[: len(block)]) if of_magnitudes else block


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


def magnitude_thresholds(task_vectors: Tensor, density: Shares) -> Tensor:
    """Return the thresholds of the magnitudes, shape (experts, 1), without a copy of them."""
    check_density(density)
    entries = task_vectors[0].numel()
    shares = for_each(density, len(task_vectors))
    return magnitudes_at([_first_kept(share, entries) for share in shares], task_vectors)


def magnitudes_at(ranks: Sequence[int], task_vectors: Tensor) -> Tensor:
    """Return the magnitude that has a rank in its expert, 1 that of the smallest, without a copy of all.

    Args:
        ranks: one for each expert.
        task_vectors: shape (experts, *parameter), float32.

    Returns:
        Shape (experts, 1).
    """
    rows = [row.reshape(-1) for row in task_vectors]
    if len(rows[0]) < _MANY:
        return torch.stack(list(map(_smallest_magnitude, rows, ranks)))[:, None]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # NumPy itself has but one
        return torch.stack(list(threads.map(_smallest_magnitude, rows, ranks)))[:, None]


def _smallest_magnitude(values: Tensor, rank: int) -> Tensor:
    return smallest(values, rank, of_magnitudes=True)


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


def keep_largest(task_vectors: Tensor, density: Shares) -> Tensor:
    """Set to zero all but the `density` share of each expert's entries with the largest magnitudes."""
    return task_vectors * largest(task_vectors.abs(), density)


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
