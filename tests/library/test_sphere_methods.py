"""Methods that treat task vectors as directions, on angles that are known."""

import math

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.errors import UserError

HALF = math.sqrt(0.5)


def stacked(*experts: list[float]) -> Tensor:
    return torch.tensor(experts, dtype=torch.float32)


def check(merged: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_slerp_goes_between_the_weights_of_two_experts():
    # The experts' weights are (1, 0) and (0, 1).
    merged = method("slerp").merge(stacked([0, 0], [-1, 1]), torch.tensor([1.0, 0.0]))
    check(merged, [HALF - 1, HALF])


def test_slerp_ends_at_the_experts():
    experts, seed = stacked([1, 2], [-3, 1]), torch.tensor([0.5, 0.5])
    check(method("slerp").merge(experts, seed, t=0.0), [1, 2])
    check(method("slerp").merge(experts, seed, t=1.0), [-3, 1])


def test_nuslerp_keeps_the_lengths_of_the_task_vectors():
    # A third of the way through a right angle: sin 60 of the first, sin 30 of the second.
    check(method("nuslerp").merge(stacked([1, 0], [0, 2]), t=1 / 3), [math.sqrt(3) / 2, 1])


@pytest.mark.parametrize(
    ("second", "expected"),
    [([3, 0], [2, 0]), ([-1, 0], [0, 0]), ([0, 0], [0.5, 0])],
    ids=["same", "opposite", "zero"],
)
def test_nuslerp_without_a_great_circle_is_linear(second, expected):
    check(method("nuslerp").merge(stacked([1, 0], second)), expected)


def test_slerp_takes_two_experts():
    with pytest.raises(UserError, match="exactly 2 experts, not 3"):
        method("nuslerp").merge(torch.ones(3, 4))


def test_karcher_mean_of_three_axes():
    side = 2 / math.sqrt(3)
    check(method("karcher").merge(stacked([1, 0, 0], [0, 2, 0], [0, 0, 3])), [side, side, side])


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_mean_angle_in_a_plane(name):
    # Angles 0, 0 and 90 degrees: 30.
    check(method(name).merge(stacked([1, 0], [1, 0], [0, 1])), [math.sqrt(3) / 2, 0.5])


def test_multislerp_weighs_the_experts():
    # The angle is 30 degrees and the norm (2 * 3 + 1 * 6) / 3.
    check(method("multislerp").merge(stacked([3, 0], [0, 6]), weights=[2.0, 1.0]), [2 * math.sqrt(3), 2])


def test_karcher_mean_minimises_the_squared_angles():
    experts = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3], [0.5, 0.1, 1.0], [0.9, 0.8, 0.1]]), dim=1
    )

    def loss(direction: Tensor) -> float:
        return torch.arccos(experts @ (direction / direction.norm())).square().sum().item()

    mean = method("karcher").merge(experts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert loss(mean) < loss(mean + 0.02 * torch.randn(3, generator=generator))


def test_a_zero_task_vector_has_no_direction():
    check(method("karcher").merge(stacked([3, 0], [0, 0])), [3, 0])


def test_directions_that_cancel_give_zero():
    check(method("karcher").merge(stacked([1, 0], [-2, 0])), [0, 0])


def test_nuslerp_goes_along_each_row_or_column():
    # Right angles half way: HALF of each. Equal rows stay.
    first, second = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    expected = torch.tensor([[HALF, HALF], [3.0, 0.0]])
    merged = method("nuslerp").merge(torch.stack([first, second]), flatten=False)
    torch.testing.assert_close(merged, expected)
    columns = torch.stack([first.T, second.T])
    torch.testing.assert_close(method("nuslerp").merge(columns, flatten=False, row_wise=True), expected.T)


def test_model_stock_by_rows_gives_each_row_its_own_share():
    # The first rows are equal, so that their mean stays; the second ones are at a right angle and leave the seed.
    stack = torch.tensor([[[1.0, 2.0], [1.0, 0.0]], [[1.0, 2.0], [0.0, 1.0]]])
    merged = method("model_stock").merge(stack, filter_wise=True)
    torch.testing.assert_close(merged, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


def test_multislerp_with_weights_as_they_are():
    # A quarter of each of two equal experts: half of the mean norm, in their direction.
    merged = method("multislerp").merge(
        stacked([2, 0], [2, 0]), weights=[0.25, 0.25], normalize=False, reading="mergekit"
    )
    check(merged, [1, 0])
    with pytest.raises(UserError, match="leave normalize=False out"):
        method("multislerp").merge(stacked([2, 0], [2, 0]), normalize=False)
    with pytest.raises(UserError, match=r"\[-1, 2\]: shares of a mean are at least 0"):
        method("multislerp").merge(stacked([2, 0], [2, 0]), weights=[-1, 2])
    with pytest.raises(UserError, match=r"weights \[1, -1\] sum to 0"):
        method("multislerp").merge(stacked([2, 0], [2, 0]), weights=[1, -1], reading="mergekit")
