"""The plain or weighted mean of the experts."""

from collections.abc import Sequence

from torch import Tensor

from selfdev.algorithms.library.specification import NORMALIZE, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import combination
from selfdev.errors import UserError


def linear(
    task_vectors: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
) -> Tensor:
    """Average the task vectors: a model soup (Wortsman et al. 2022, arXiv 2203.05482).

    With weights w the sum of the w_i d_i, divided by that of the w_i. The paper's uniform soup has equal weights, its
    learned soup others, which tuning searches here. Another length than a mean's is what task_arithmetic and
    weighted_task_arithmetic search.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter), float32; for `normalize=False` alone.
        weights: one for each expert, any numbers whose sum is not 0, brought to sum 1; equal if None.
        normalize: None, as True, does the above. False leaves the weights as they are, any numbers, 1 if None, and adds
            up the experts' tensors themselves, as mergekit does under that flag.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if normalize is False:
        if seed_tensor is None:
            raise UserError("a sum of the experts' own tensors needs the seed's tensor; pass it")
        factors = (
            task_vectors.new_ones(len(task_vectors)) if weights is None else task_vectors.new_tensor(weights)
        )
        return combination(factors, task_vectors, seed_tensor)
    if weights is None:
        return task_vectors.mean(dim=0)
    total = sum(weights)
    if total == 0.0:
        raise UserError(
            f"weights {list(weights)}: a mean divides by their sum, which is 0; change one of them"
        )
    merged = task_vectors[0] * (weights[0] / total)
    for expert, weight in zip(task_vectors[1:], weights[1:], strict=True):
        merged.add_(expert, alpha=weight / total)
    return merged


METHOD = Method(
    name="linear",
    function=linear,
    parameters=(Parameter("weights", default=None, low=0.0, high=1.0, per_expert=True), NORMALIZE),
    paper=Paper("Wortsman et al.", 2022, "2203.05482"),
    summary="the mean of the experts (model soup)",
    needs_seed_with=("normalize", False),
    entrywise=True,
)
