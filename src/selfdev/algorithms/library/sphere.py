"""Directions of task vectors as points of a sphere."""

import torch
from torch import Tensor

# Below this sine two directions count as parallel, and the formulas divide by zero.
_PARALLEL = 1e-6


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Go the share `t` of the way from `first` to `second` along the great circle.

    The tensors keep their own lengths: sin((1 - t) angle) / sin(angle) times the first plus sin(t angle) /
    sin(angle) times the second. Parallel, opposite or zero tensors have no great circle; they are
    interpolated linearly.
    """
    lengths = first.norm() * second.norm()
    cosine = (first * second).sum() / torch.where(lengths > 0, lengths, 1.0)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(angle)
    if lengths == 0 or sine < _PARALLEL:
        return (1.0 - t) * first + t * second
    return (torch.sin((1.0 - t) * angle) * first + torch.sin(t * angle) * second) / sine


def karcher_mean(directions: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Average unit vectors on the sphere, from their normalised mean on.

    Each step maps the directions into the tangent space at the present mean, averages them there, and follows
    the average along the sphere.

    Args:
        directions: shape (points, entries), each of length 1.
        weights: shape (points,), sum 1.
        steps: how many at most; stops where nothing changes any more.

    Returns:
        Shape (entries,), length 1, or zero if the directions cancel each other.
    """
    mean: Tensor = weights @ directions
    length = mean.norm()
    if length < _PARALLEL:
        return torch.zeros_like(mean)
    mean = mean / length
    for _ in range(steps):
        cosines = (directions @ mean).clamp(-1.0, 1.0)
        angles = torch.arccos(cosines)
        sines = torch.sin(angles)
        # The limit of angle / sine is 1 at a parallel direction; an opposite one has no shortest way.
        factors = torch.where(sines > _PARALLEL, angles / sines.clamp(min=_PARALLEL), 1.0)
        tangent = (weights * factors) @ (directions - cosines[:, None] * mean)
        length = tangent.norm()
        if length < _PARALLEL:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * tangent / length
        mean = mean / mean.norm()
    return mean
