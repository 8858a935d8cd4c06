"""Directions of task vectors as points of a sphere."""

import torch
from torch import Tensor

from selfdev.errors import UserError

# Entries of each tensor that are multiplied in float64 at a time.
_BLOCK = 1 << 16

# Below this sine two directions count as parallel, and the formulas divide by zero.
_PARALLEL = 1e-6


def check_two(task_vectors: Tensor) -> None:
    """Raise UserError unless there are two experts, shape (2, *parameter)."""
    if len(task_vectors) != 2:
        raise UserError(
            f"a great circle joins 2 experts, not {len(task_vectors)}; use 'karcher' for any other number"
        )


def gram(tensors: Tensor, origin: Tensor | None = None) -> Tensor:
    """Return the inner products of tensors, summed in float64.

    Angles between fine-tuned relatives are small, and in float32 their cosines would be 1.

    Args:
        tensors: shape (points, *parameter).
        origin: added to each of them, shape (*parameter); zero if None.

    Returns:
        Shape (points, points), float64.
    """
    flat = tensors.reshape(len(tensors), -1)
    shift = None if origin is None else origin.reshape(-1)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for start in range(0, flat.shape[1], _BLOCK):
        block = flat[:, start : start + _BLOCK]
        block = (block if shift is None else block + shift[start : start + _BLOCK]).double()
        products += block @ block.T
    return products


def gram_by_row(tensors: Tensor) -> Tensor:
    """Return the inner products of the tensors' rows, each with those at the same place, summed in float64.

    Args:
        tensors: shape (points, *places, entries).

    Returns:
        Shape (points, points, *places), float64.
    """
    points, *places, entries = tensors.shape
    rows = tensors.reshape(points, -1, entries)
    step = max(1, _BLOCK // max(1, entries))
    blocks = (rows[:, start : start + step].double() for start in range(0, rows.shape[1], step))
    products = [torch.einsum("ire,jre->ijr", block, block) for block in blocks]
    return torch.cat(products, dim=2).reshape(points, points, *places)


def combination(factors: Tensor, tensors: Tensor, origin: Tensor | None = None) -> Tensor:
    """Add tensors, each with a factor; with an origin, which stands in each of them, less the origin.

    Args:
        factors: shape (points,).
        tensors: shape (points, *parameter), measured from the origin.
        origin: shape (*parameter); zero if None.

    Returns:
        Shape (*parameter), measured from the origin.
    """
    total: Tensor = factors.to(tensors.dtype) @ tensors.reshape(len(tensors), -1)
    total = total.reshape(tensors.shape[1:])
    return total if origin is None else total.add_(origin, alpha=factors.sum().item() - 1.0)


def slerp(
    products: Tensor, t: float, parallel: float | None = None, *, zero_is_orthogonal: bool = False
) -> Tensor:
    """Go the share `t` of the way from one tensor to another along the great circle.

    The tensors keep their own lengths: sin((1 - t) angle) / sin(angle) times the first plus sin(t angle) /
    sin(angle) times the second. Parallel, opposite or zero tensors have no great circle; they are
    interpolated linearly.

    Args:
        products: of the two tensors, from `gram`, or of each pair of their rows, from `gram_by_row`.
        t: in [0, 1].
        parallel: magnitude of the cosine above which tensors count as parallel; that of a sine of 1e-6 if
            None.
        zero_is_orthogonal: whether a zero tensor lies at a right angle to every other.

    Returns:
        The factors of both, shape (2,) or (2, *places), float64.
    """
    lengths = products[0, 0].sqrt() * products[1, 1].sqrt()
    cosine = (products[0, 1] / torch.where(lengths > 0, lengths, 1.0)).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    shares = products.new_tensor([1.0 - t, t]).reshape(2, *[1] * sine.dim())
    flat = sine < _PARALLEL if parallel is None else cosine.abs() > parallel
    if not zero_is_orthogonal:
        flat = flat | (lengths == 0)
    return torch.where(flat, shares, torch.sin(shares * angle) / torch.where(flat, 1.0, sine))


def karcher_mean(
    cosines: Tensor,
    weights: Tensor,
    steps: int,
    *,
    start: Tensor | None = None,
    enough: float = _PARALLEL,
) -> Tensor:
    """Average unit vectors on the sphere, from their normalised mean on.

    Each step maps the directions into the tangent space at the present mean, averages them there, and follows
    the average along the sphere. The mean is always a combination of the directions, so that their cosines
    are all that is needed, whatever the size of the tensors.

    Args:
        cosines: between all directions, shape (points, points), float64.
        weights: shape (points,), sum 1.
        steps: how many at most.
        start: a combination to start from instead of the mean, shape (points,).
        enough: length of a step, in radians, below which it is not taken any more.

    Returns:
        The factor of each direction, shape (points,), float64: a combination of length 1, or zeros if the
        directions cancel each other.
    """
    weights = weights.double()

    def length_of(combination: Tensor) -> Tensor:
        return (combination @ cosines @ combination).clamp(min=0.0).sqrt()

    mean: Tensor = weights if start is None else start.double()
    length = length_of(mean)
    if length < _PARALLEL:
        return torch.zeros_like(mean)
    mean = mean / length
    for _ in range(steps):
        to_mean = (cosines @ mean).clamp(-1.0, 1.0)
        angles = torch.arccos(to_mean)
        sines = torch.sin(angles)
        # The limit of angle / sine is 1 at a parallel direction; an opposite one has no shortest way.
        pulls = weights * torch.where(sines > _PARALLEL, angles / sines.clamp(min=_PARALLEL), 1.0)
        tangent = pulls - (pulls @ to_mean) * mean
        length = length_of(tangent)
        if length < enough:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * tangent / length
        mean = mean / length_of(mean)
    return mean


def spherical_mean(
    task_vectors: Tensor,
    weights: Tensor,
    steps: int,
    enough: float = _PARALLEL,
    origin: Tensor | None = None,
) -> Tensor:
    """Average the directions of task vectors by `karcher_mean`, and their norms on the line.

    Args:
        task_vectors: shape (experts, *parameter). A zero one has no direction, and is left out.
        weights: shape (experts,); negative ones count as 0.
        steps: how many at most.
        enough: as in `karcher_mean`.
        origin: added to each task vector, so that it is the weights that are averaged; as in `combination`.

    Returns:
        Shape (*parameter); zero if the directions cancel each other, or none has a weight.
    """
    products = gram(task_vectors, origin)
    norms = products.diagonal().sqrt()
    counted = weights.double().clamp(min=0.0) * (norms > 0)
    if not counted.any():
        return torch.zeros_like(task_vectors[0]) if origin is None else -origin
    lengths = torch.where(norms > 0, norms, 1.0)
    shares = counted / counted.sum()
    mean = karcher_mean(products / torch.outer(lengths, lengths), shares, steps, enough=enough)
    return combination((shares @ norms) * mean / lengths, task_vectors, origin)
