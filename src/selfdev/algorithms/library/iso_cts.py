"""Iso-CTS: singular values made equal, with directions of each expert's own."""

import torch
from torch import Tensor

from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components, each_matrix, largest_value, orthogonal
from selfdev.errors import UserError


@each_matrix
def iso_cts(task_vectors: Tensor, *, common_share: float = 0.8, scale: float = 1.0) -> Tensor:
    """Iso-C with a part of the spectrum kept for each expert alone (Marczak et al. 2025, arXiv 2502.04959).

    The strongest `common_share` of the directions of the sum are kept. What each expert has outside their
    left span gives its own strongest directions, the rest shared out evenly. All are put side by side, made
    orthonormal, and get the mean of their singular values; those that a matrix of low rank lacks count as zero.
    Tensors that are no matrices are averaged.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        common_share: share of the rank that the sum's own directions take, in [0, 1]; they are at least one.
        scale: factor on the merged task vector, the mean of the tensors that are no matrices included; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not 0.0 <= common_share <= 1.0:
        raise UserError(f"common_share {common_share}: it is a share of the rank; give a number in [0, 1]")
    if task_vectors.dim() != 3:
        return scale * task_vectors.mean(dim=0)
    full = min(task_vectors.shape[1:])
    common = max(1, round(common_share * full))
    special = (full - common) // len(task_vectors)
    shared, *others = components(task_vectors.sum(dim=0), common)
    lefts, values, rights = [shared], others[:1], others[1:]
    for matrix in task_vectors:
        # Of a matrix of low rank, as LoRA makes them, nothing but rounding may lie outside.
        apart = torch.addmm(matrix, shared, shared.T @ matrix, alpha=-1.0)
        own = components(apart, special, beside=largest_value(matrix))
        for kept, found in zip((lefts, values, rights), own, strict=True):
            kept.append(found)
    del shared, others, apart, own, found  # what is in the lists would stay in memory when they are emptied
    level = torch.cat(values).sum() / max(1, common + special * len(task_vectors))
    return orthogonal(lefts).mul_(scale * level) @ orthogonal(rights).T


METHOD = Method(
    name="iso_cts",
    function=iso_cts,
    parameters=(
        Parameter("common_share", default=0.8, low=0.2, high=1.0),
        Parameter("scale", default=1.0, low=0.1, high=2.0, screened=False),
    ),
    paper=Paper("Marczak et al.", 2025, "2502.04959"),
    summary="Iso-C with a part of the spectrum kept for each expert alone",
)
