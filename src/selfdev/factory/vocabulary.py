"""Functions of the vocabulary's logits that never hold all of them.

Logits are the largest tensors of a training pass: positions times the vocabulary. Here they exist for `CHUNK` positions
at a time. The gradient with respect to the hidden states is known in the forward pass already, and the backward pass is
one multiplication, unless the output layer is trained as well: that needs the logits once more.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from selfdev.models.output_head import logits_in_blocks

CHUNK = 256
"""Positions whose vocabulary logits exist at once."""

Direction = Literal["forward", "reverse"]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        # d log p / d hidden = W[target] - E_p[W]
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = logits_in_blocks(hidden[rows], weight, bias).float()
            lse = logits.logsumexp(-1, keepdim=True)
            log_probs[rows] = (logits.gather(-1, target[rows, None]) - lse)[:, 0]
            if slope is not None:
                expected = logits.sub_(lse).exp_().to(weight.dtype) @ weight
                slope[rows] = weight[target[rows]] - expected
        if slope is not None:
            of_layer = (hidden, weight, bias, target) if ctx.needs_input_grad[1] else ()
            ctx.save_for_backward(slope, *of_layer)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        slope, *of_layer = ctx.saved_tensors
        factor = grads[0][:, None].to(slope.dtype)
        to_weight, to_bias = _to_layer(factor, *of_layer) if of_layer else (None, None)
        return slope * factor, to_weight, to_bias, None


def _to_layer(
    factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of sum(factor log p[target]).

    With respect to W they are, of each position, (onehot - p) hidden^T, and with respect to the bias onehot - p.
    """
    to_weight = torch.zeros_like(weight)
    to_bias = None if bias is None else torch.zeros_like(bias)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        p = logits_in_blocks(hidden[rows], weight, bias).float().softmax(-1)
        # The onehot here and not by rows of W: many positions have one target, and a GPU adds those up in any order.
        p.scatter_add_(-1, target[rows, None], p.new_full((len(p), 1), -1.0))
        p = p.to(weight.dtype).mul_(factor[rows])
        to_weight.addmm_(p.T, hidden[rows], alpha=-1)
        if to_bias is not None:
            to_bias -= p.sum(0)
    return to_weight, to_bias


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        direction: Direction,
    ) -> Tensor:
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = logits_in_blocks(hidden[rows], weight, bias).float().log_softmax(-1)
            log_q = logits_in_blocks(reference[rows], weight, bias).float().log_softmax(-1)
            if direction == "reverse":
                p, ratio = log_p.exp(), log_p.sub_(log_q)
                found[rows] = (p * ratio).sum(-1)
                # d / d logits of sum p (log p - log q) = p (log p - log q - the sum)
                by_logit = p.mul_(ratio.sub_(found[rows, None]))
            else:
                q = log_q.exp()
                found[rows] = (q * (log_q - log_p)).sum(-1)
                by_logit = log_p.exp_().sub_(q)  # d / d logits of -sum q log p = p - q
            if slope is not None:
                slope[rows] = by_logit.to(weight.dtype) @ weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None, None, None


def token_log_probs(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Log softmax(hidden W^T + b)[target], position by position.

    Args:
        hidden: last hidden states, shape (positions, width); differentiable.
        weight: W of the output layer, shape (vocabulary, width); differentiable.
        target: token ids, shape (positions,).
        bias: b of the output layer, shape (vocabulary,), differentiable where W is; None for none.

    Returns:
        Nats, shape (positions,), float32.
    """
    found: Tensor = _TokenLogProbs.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]
    return found


def divergence(
    hidden: Tensor, reference: Tensor, weight: Tensor, direction: Direction, bias: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of two next-token distributions over the whole vocabulary, position by position.

    Args:
        hidden: last hidden states of the model, shape (positions, width); differentiable.
        reference: those of the reference, which has the same output layer; no gradient.
        weight: W of that frozen layer, shape (vocabulary, width).
        direction: `reverse`: KL(model || reference), large where the model likes what the reference does not, the
            term of RLHF's and DPO's objective. `forward`: KL(reference || model), large where the model has forgotten
            what the reference likes.
        bias: of that layer, shape (vocabulary,); None for none.

    Returns:
        Nats, shape (positions,), float32, at least 0 up to rounding.
    """
    found: Tensor = _Divergence.apply(hidden, reference, weight, bias, direction)  # type: ignore[no-untyped-call]
    return found
