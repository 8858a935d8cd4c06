"""DOGE-TA: Task Arithmetic with a correction that brings back what every expert loses in the sum."""

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Stack, blockwise
from selfdev.algorithms.library.specification import Method, Paper, Parameter
from selfdev.algorithms.library.spectrum import components, each_matrix
from selfdev.algorithms.library.trimming import check_density, magnitude_thresholds
from selfdev.errors import UserError

# Conjugate gradients stop after so many steps, or where the gradient has shrunk by this factor.
_STEPS = 50
_SOLVED = 1e-5


@each_matrix
def doge_ta(
    task_vectors: Tensor,
    *,
    step: float = 0.07,
    density: float = 0.3,
    shared: float = 1 / 6,
    scale: float = 1.0,
) -> Tensor:
    """Add trimmed task vectors with a common correction (Wei et al. 2025, arXiv 2501.01230, DOGE).

    Expert i with task vector D_i has the coefficient l_i = step / |D_i| (Frobenius norm). With the sum M of
    the l_i D_i and s of the l_i, the correction C minimises the loss, over experts j and rows r, of the sum
    of squares of <D_j[r], D_j[r] - M[r] - s C[r]>: along every row's own change the merged model moves as far
    as the expert did. C is kept out of the shared subspace: the strongest left singular directions of the
    experts' own strongest ones (1 / experts of the rank each) put side by side. The merged task vector is the
    sum of l_i (D_i + C), each at the largest entries of D_i alone.

    The paper takes 400 steps of Adam with a step of 1e-4 from C = 0 on. The loss is quadratic, and conjugate
    gradients come to the smallest C that minimises it, whatever the size of the weights: at most 50 steps, or until the
    gradient has shrunk by 1e-5, so that experts next to equal are not told apart. The paper trims over the whole model
    at once, here each tensor is trimmed on its own. Tensors that are no matrices have no C.

    Args:
        task_vectors: shape (experts, *parameter), float32; a matrix is (outputs, inputs).
        step: eta of the paper, in units of the weights: the norm to which each task vector is brought, above 0.
            The paper uses 0.07.
        density: share of each task vector's entries that count in the sum, by magnitude; in (0, 1]. The
            paper's experiments use 0.3.
        shared: share of the rank that the shared subspace takes, in [0, 1]; the authors' code takes a sixth.
        scale: factor on the merged task vector; any number.

    Returns:
        The merged task vector, shape (*parameter).
    """
    check_density(density)
    if not step > 0.0 or not 0.0 <= shared <= 1.0:
        raise UserError(f"step {step} must be above 0 and shared {shared} a share of the rank in [0, 1]")
    norms = torch.stack([vector.norm() for vector in task_vectors])
    factors = torch.where(norms > 0, step / norms, 0.0)
    least = magnitude_thresholds(Stack.of(task_vectors), density)
    correction = torch.zeros_like(task_vectors[0])
    if task_vectors.dim() == 3:
        correction = _correction(task_vectors, factors, _shared_directions(task_vectors, shared))

    def merge(block: Tensor, entries: slice) -> Tensor:
        moved = (block + correction.reshape(-1)[entries]) * (block.abs() >= least)
        return (scale * factors) @ moved

    return blockwise(merge, task_vectors)


def _shared_directions(task_vectors: Tensor, shared: float) -> Tensor:
    """Return orthonormal columns that span the shared subspace, shape (rows, directions)."""
    rank = min(task_vectors.shape[1:])
    each = rank // len(task_vectors)
    own = torch.cat([components(matrix, each)[0] for matrix in task_vectors], dim=1)
    return components(own, int(shared * rank))[0]


def _correction(task_vectors: Tensor, factors: Tensor, shared: Tensor) -> Tensor:
    """Minimise the loss over corrections without a shared part, by conjugate gradients from zero.

    Every correction on the way is made of the experts' rows. What is kept of it is their coefficients, shape
    (experts, rows), so that beside the experts one matrix and a product are in memory.
    """
    total = factors.sum()

    def made_of(coefficients: Tensor) -> Tensor:
        """The experts' rows with these coefficients, without their shared part: the transpose of `along`."""
        matrix = torch.zeros_like(task_vectors[0])
        for vector, row in zip(task_vectors, coefficients.float(), strict=True):
            matrix.addcmul_(vector, row[:, None])
        return matrix.addmm_(shared, shared.T @ matrix, alpha=-1.0).mul_(total)

    def along(matrix: Tensor) -> Tensor:
        """The product of each row with that of each expert, shape (experts, rows)."""
        return torch.stack([(vector * matrix).sum(dim=1) for vector in task_vectors]).double()

    merged = torch.tensordot(factors, task_vectors, dims=1)
    lost = torch.stack([vector.square().sum(dim=1) for vector in task_vectors]).double() - along(merged)
    del merged
    # The method of least squares (CGLS), in which the matrices are those of the coefficients `found` and `direction`.
    found, direction = torch.zeros_like(lost), lost
    curved = gradient = total * along(made_of(lost))
    power = (lost * gradient).sum()
    enough = _SOLVED**2 * power
    for _ in range(_STEPS):
        if power <= enough:
            break
        length = power / curved.square().sum()
        found = found + length * direction
        lost = lost - length * curved
        gradient = total * along(made_of(lost))
        before, power = power, (lost * gradient).sum()
        direction = lost + (power / before) * direction
        curved = gradient + (power / before) * curved
    return made_of(found)


METHOD = Method(
    name="doge_ta",
    function=doge_ta,
    parameters=(
        Parameter("step", default=0.07, low=0.01, high=10.0, log=True),
        Parameter("density", default=0.3, low=0.1, high=1.0),
        Parameter("shared", default=1 / 6, low=0.0, high=0.5),
        Parameter("scale", default=1.0, low=0.2, high=2.0, log=True, screened=False),
    ),
    paper=Paper("Wei et al.", 2025, "2501.01230"),
    summary="Task Arithmetic with a correction for what each expert loses",
)
