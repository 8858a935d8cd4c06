import math

import pytest
import torch

from selfdev.factory.losses import (
    Name,
    hinge,
    ipo,
    kto,
    kto_reference_point,
    preference_loss,
    robust,
    sigmoid,
)

MARGIN = torch.tensor([2.0, 0.0, -4.0])
"""With beta 0.5: 1, 0 and -2."""


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_sigmoid() -> None:
    assert sigmoid(MARGIN, 0.5).tolist() == pytest.approx([softplus(-1), math.log(2), softplus(2)])


def test_hinge_stops_where_the_margin_is_one_over_beta() -> None:
    assert hinge(MARGIN, 0.5).tolist() == [0, 1, 3]


def test_ipo_pulls_the_margin_to_a_target_and_not_beyond() -> None:
    # beta 0.25: the target is 2
    assert ipo(torch.tensor([2.0, 5.0, -1.0]), 0.25).tolist() == [0, 9, 9]


def test_robust() -> None:
    # flip rate 0.25: (0.75 sigmoid(m) - 0.25 sigmoid(-m)) / 0.5
    expected = [(0.75 * softplus(-x) - 0.25 * softplus(x)) / 0.5 for x in (1, 0, -2)]
    assert robust(MARGIN, 0.5, 0.25).tolist() == pytest.approx(expected)
    assert torch.equal(robust(MARGIN, 0.5, 0.0), sigmoid(MARGIN, 0.5))


def test_robust_is_unbiased() -> None:
    """Its mean over labels, of which a share is flipped, is the sigmoid loss of the right ones."""
    rate = 0.2
    mean = (1 - rate) * robust(MARGIN, 0.5, rate) + rate * robust(-MARGIN, 0.5, rate)
    torch.testing.assert_close(mean, sigmoid(MARGIN, 0.5))


def test_kto() -> None:
    logistic = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = kto(torch.tensor([3.0, 1.0]), torch.tensor([-1.0]), 0.5, torch.tensor(1.0))
    # beta (gain - z): 1 and 0 for the chosen; beta (z - gain): 1 for the rejected
    assert found.item() == pytest.approx((1 - logistic(1) + 0.5) / 2 + 1 - logistic(1))
    assert kto(torch.ones(2), torch.ones(3), 0.1, torch.tensor(1.0)).item() == 1
    assert kto(torch.ones(2), torch.ones(0), 0.1, torch.tensor(1.0)).item() == 0.5


def test_ktos_reference_point_has_no_gradient_and_is_never_below_0() -> None:
    gain = torch.tensor([4.0, -1.0], requires_grad=True)
    assert kto_reference_point(gain).item() == 1.5
    assert not kto_reference_point(gain).requires_grad
    assert kto_reference_point(torch.tensor([-4.0, 1.0])).item() == 0


GAIN = torch.tensor([2.0, -2.0, 0.0])
PAIRS = torch.tensor([[0, 1], [0, 2]])
"""Margins 4 and 2; completions of 2, 4 and 1 tokens: gains by the token 1, -0.5 and 0."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", (softplus(-2) + softplus(-1)) / 2),
        ("hinge", 0.0),
        ("ipo", (0.5**2 + 0.0) / 2),  # margins by the token 1.5 and 1; the target is 1
        ("robust", ((0.9 * (softplus(-2) + softplus(-1)) - 0.1 * (softplus(2) + softplus(1))) / 0.8) / 2),
        # z is 0; the chosen program counts once though it stands in two pairs
        ("kto", 1 - 1 / (1 + math.exp(-1)) + (1 - 1 / (1 + math.exp(-1)) + 0.5) / 2),
    ],
)
def test_a_steps_loss_by_its_name(name: Name, expected: float) -> None:
    tokens = torch.tensor([2, 4, 1])
    loss, margin = preference_loss(name, GAIN, tokens, PAIRS, beta=0.5, flip_rate=0.1)
    assert loss.item() == pytest.approx(expected)
    assert margin.item() == 3


def test_to_kto_a_program_that_is_chosen_and_rejected_in_a_step_is_liked() -> None:
    chain = torch.tensor([[0, 2], [2, 1]])
    loss, _ = preference_loss("kto", GAIN, torch.ones(3), chain, beta=0.5)
    expected, _ = preference_loss("kto", GAIN, torch.ones(3), torch.tensor([[0, 1], [2, 1]]), beta=0.5)
    assert loss == expected


def test_before_training_the_loss_is_log_2() -> None:
    for name in ("sigmoid", "robust"):
        loss, _ = preference_loss(name, torch.zeros(3), torch.ones(3), PAIRS, beta=0.1, flip_rate=0.3)
        assert loss.item() == pytest.approx(math.log(2))
