"""Linear layers with LoRA, with fewer passes over memory than PEFT's.

    y = W x + s B (A x)

PEFT makes the terms one by one, and autograd their gradients. Each is a tensor of the size of the output or the input,
and on a CPU reading and writing them takes as long as some of the products. Here every sum is the tail of a product.
What is kept for the backward pass is what PEFT keeps: x and A x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        inner = flat @ a.T
        out = F.linear(flat, weight, bias).addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        to_inner = (grad @ b).mul_(ctx.scale)
        to_a = to_inner.T @ x.flatten(0, -2)
        to_b = (grad.T @ inner).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(to_inner, a).view_as(x)
        return to_x, None, None, to_a, to_b, None


def _forward(layer: Any, adapter: str, x: Tensor) -> Tensor:
    base = layer.base_layer
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    out: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[adapter])  # type: ignore[no-untyped-call]
    return out


def _plain(layer: Any) -> bool:
    """Whether a layer is a frozen linear one with one active LoRA adapter that is nothing more."""
    if type(layer) is not Linear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    [adapter] = layer.active_adapters
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and not any(each.requires_grad for each in base.parameters())
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and layer.lora_B[adapter].bias is None
        and layer.lora_A[adapter].weight.dtype == base.weight.dtype
    )


@contextmanager
def lean_lora(model: nn.Module) -> Iterator[None]:
    """Within it, those layers of a model with a LoRA adapter that are plain ones compute as this module says."""
    layers: list[Any] = [layer for layer in model.modules() if _plain(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.active_adapters[0])
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
