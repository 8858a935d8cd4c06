"""LoRA's linear layers against PEFT's own."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from selfdev.factory.lora_linear import lean_lora


def adapted(bias: bool = True, **more: Any) -> PeftModel:
    """Two layers with LoRA whose factors are both away from zero; alpha is not the rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias), nn.Tanh(), nn.Linear(9, 4, bias)).double()
    lora = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"], **more})
    found = get_peft_model(model, lora)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return found


def slopes(model: PeftModel, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of something with respect to the input and to all that is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.pow(2).sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {"x": x.grad, **found}


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias: bool) -> None:
    model = adapted(bias)
    expected = slopes(model, X)
    with lean_lora(model):
        assert_same(slopes(model, X), expected)
        frozen = {name for name, p in model.named_parameters() if p.grad is None}
        assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    after = slopes(model, X)
    assert torch.equal(after[0], expected[0])
    assert "forward" not in vars(model.get_submodule("base_model.model.0"))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_what_is_more_than_plain_lora_is_left_to_peft(more: dict[str, Any]) -> None:
    model = adapted(**more)
    torch.manual_seed(3)
    expected = slopes(model, X)
    torch.manual_seed(3)
    with lean_lora(model):
        assert_same(slopes(model, X), expected)


def test_an_adapter_that_is_off_or_merged_stays_so() -> None:
    model = adapted()
    with model.disable_adapter():
        expected = model(X)
        with lean_lora(model):
            assert torch.equal(model(X), expected)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with lean_lora(merged):
        torch.testing.assert_close(merged(X), model(X), atol=1e-6, rtol=1e-6)
