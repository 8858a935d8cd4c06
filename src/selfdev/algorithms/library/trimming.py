"""Which entries of a task vector are kept: the largest, a middle band, or a random share."""

import torch
from torch import Tensor

from selfdev.errors import UserError


def check_density(density: float) -> None:
    """Raise UserError unless `density` is a share in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise UserError(f"density {density}: it is the share of entries kept; give a number in (0, 1]")


def largest(scores: Tensor, density: float) -> Tensor:
    """Mark the `density` share of entries with the highest scores, separately along the first dimension.

    At least one entry is marked; entries equal to the last one marked are marked too, so that the order of
    equal entries cannot matter. The threshold is selected, not sorted for.

    Args:
        scores: shape (rows, *entries).
        density: share of the entries of each row, in (0, 1].

    Returns:
        A boolean mask of the same shape.
    """
    check_density(density)
    flat = scores.reshape(len(scores), -1)
    entries = flat.shape[1]
    kept = max(1, int(density * entries))
    threshold = flat.kthvalue(entries - kept + 1, dim=1, keepdim=True).values
    return (flat >= threshold).reshape(scores.shape)


def keep_largest(task_vectors: Tensor, density: float) -> Tensor:
    """Set to zero all but the `density` share of each expert's entries with the largest magnitudes."""
    if density == 1.0:
        return task_vectors
    return task_vectors * largest(task_vectors.abs(), density)


def keep_randomly(task_vectors: Tensor, probability: float | Tensor, seed: int) -> Tensor:
    """Keep each entry with a probability and divide it by that, so that the expectation stays.

    Args:
        task_vectors: shape (experts, *parameter).
        probability: of keeping an entry, in (0, 1]; one number or a tensor of the same shape.
        seed: of a generator of its own; torch's global one is not touched.

    Returns:
        The thinned task vectors, same shape.
    """
    generator = torch.Generator(device=task_vectors.device).manual_seed(seed)
    uniform = torch.rand(task_vectors.shape, generator=generator, device=task_vectors.device)
    return task_vectors * (uniform < probability) / probability
