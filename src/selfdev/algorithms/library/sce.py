"""SCE: select by variance, calculate weights, erase minorities."""

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import blockwise, entrywise, in_blocks
from selfdev.algorithms.library.sign_election import disjoint_mean, elected_sign
from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.trimming import check_density, exactly, largest, marked_at

# mergekit's bound: of the summed mean squares, below which experts weigh the same, and of what divides an entry.
_NOTHING = 1e-6

# Entries of each expert whose squares are added up at a time.
_BLOCK = 1 << 16


def sce(task_vectors: Tensor, *, density: float = 0.1, scale: float = 1.0, reading: str = PAPER) -> Tensor:
    """Select entries by variance, weight by energy, erase minority signs (Wan et al. 2024, arXiv 2408.07990).

    Kept are the `density` share of entries with the largest variance over the experts. An expert's weight is
    its share of the sum of squares of what is kept (equal weights if nothing is left). Values against the
    elected sign are erased, and the weights of the rest are brought to sum 1 at each entry.

    mergekit weighs the experts equally where their mean squares sum to less than 1e-6, which task vectors with
    entries around 0.001 already do; here only where they are zero. It keeps the share of the entries whose
    variance is not zero, so that of one expert alone nothing is left, where here everything is; at density 1
    it keeps all. Where the votes cancel it elects the positive sign, and weights that sum to less than 1e-6 at
    an entry divide as 1e-6. `reading="mergekit"` gives all that.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        density: share of the entries kept, in (0, 1], mergekit's `select_topk`; the paper uses 0.1.
        scale: factor on the merged task vector; any number.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    selected = (_selected_by_mergekit if reading == MERGEKIT else _selected)(task_vectors, density)
    energies = _energies(task_vectors, selected)
    least = _NOTHING * len(selected) if reading == MERGEKIT else 0.0
    equal = torch.full_like(energies, 1.0 / len(energies))
    weights = (energies / energies.sum() if energies.sum() > least else equal).float()[:, None]
    mean = _mergekits_mean if reading == MERGEKIT else disjoint_mean
    merged = blockwise(lambda block, entries: mean(block * selected[entries], weights), task_vectors)
    return merged.mul_(scale)


def _selected(task_vectors: Tensor, density: float) -> Tensor:
    # Many times as fast as torch.var, which goes through the experts one number at a time.
    variance = entrywise(lambda block: (block - block.mean(dim=0)).square_().mean(dim=0), task_vectors)
    return largest(variance.reshape(1, -1), density)[0]


def _selected_by_mergekit(task_vectors: Tensor, density: float) -> Tensor:
    # torch.var, as there: another rounding would rank entries of nearly equal variance differently.
    variance = task_vectors.var(dim=0, correction=0).reshape(-1)
    if density == 1.0:
        return torch.ones_like(variance, dtype=torch.bool)
    count = int(density * int(torch.count_nonzero(variance)))
    kept = exactly(count, variance, largest=True)
    # Between equal ones mergekit's own selection decides.
    return kept if kept is not None else marked_at(variance.topk(count).indices, variance)


def _energies(task_vectors: Tensor, selected: Tensor) -> Tensor:
    """Each expert's sum of squares of what is selected, shape (experts,), added up in float64."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    energies = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for entries in in_blocks(len(selected), _BLOCK):
        energies += (flat[:, entries] * selected[entries]).square_().sum(dim=1, dtype=torch.float64)
    return energies


def _mergekits_mean(block: Tensor, weights: Tensor) -> Tensor:
    counted = (block * elected_sign(block, zero=1.0) > 0) * weights
    return (block * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=_NOTHING)


METHOD = Method(
    name="sce",
    function=sce,
    parameters=(
        Parameter("density", default=0.1, low=0.1, high=1.0),
        Parameter("scale", default=1.0, low=0.2, high=4.0, log=True, screened=False),
        READING,
    ),
    paper=Paper("Wan et al.", 2024, "2408.07990"),
    summary="entries of high variance, weighted by energy, without minority signs",
)
