import math

import pytest
import torch

from selfdev.factory import vocabulary
from selfdev.factory.vocabulary import Direction, divergence, token_log_probs

# With an output layer that changes nothing, the hidden states are the logits.
P = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
Q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # sum p log(p / q): the model is p
        ("reverse", 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        # sum q log(q / p)
        ("forward", 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
    ],
)
def test_the_direction_of_the_divergence(direction: Direction, expected: float) -> None:
    found = divergence(P.log(), Q.log(), torch.eye(2), direction)
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_reverse_shuns_what_the_reference_does_not_like_and_forward_keeps_what_it_likes() -> None:
    reference = torch.tensor([[0.499, 0.499, 0.002]]).log()
    on_one_of_two = torch.tensor([[0.996, 0.002, 0.002]]).log()
    spread = torch.tensor([[0.34, 0.33, 0.33]]).log()
    cost = {
        direction: [divergence(h, reference, torch.eye(3), direction).item() for h in (on_one_of_two, spread)]
        for direction in ("reverse", "forward")
    }
    assert cost["reverse"][0] < cost["reverse"][1]
    assert cost["forward"][0] > cost["forward"][1]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_gradient_in_chunks_is_that_of_plain_logits(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 3)
    torch.manual_seed(0)
    weight, reference, bias = torch.randn(11, 5), torch.randn(8, 5), torch.randn(11)
    scale = torch.randn(8)
    chunked, plain = (torch.randn(8, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    found = divergence(chunked.requires_grad_(), reference, weight, direction, bias)
    (found * scale).sum().backward()
    log_p, log_q = ((h @ weight.T + bias).log_softmax(-1) for h in (plain.requires_grad_(), reference))
    first, second = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    expected = (first.exp() * (first - second)).sum(-1)
    (expected * scale).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(chunked.grad, plain.grad)


def test_log_probs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 3)
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(8, 5), torch.randn(11, 5), torch.arange(8)
    expected = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(token_log_probs(hidden, weight, target), expected)
    bias = torch.randn(11)
    expected = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(token_log_probs(hidden, weight, target, bias), expected)


def test_the_gradient_of_an_output_layer_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 3)
    torch.manual_seed(0)
    hidden, weight, bias, scale = torch.randn(8, 5), torch.randn(11, 5), torch.randn(11), torch.randn(8)
    target = torch.tensor([3, 3, 0, 10, 1, 3, 7, 2])
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    plain = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    expected = torch.autograd.grad((plain * scale).sum(), inputs)
    found = torch.autograd.grad((token_log_probs(hidden, weight, target, bias) * scale).sum(), inputs)
    for its, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(its, theirs)
