"""Functions of the vocabulary's logits that never hold all of them.

Logits are the largest tensors of a training pass: positions times the vocabulary. Here they exist for `CHUNK` positions
at a time, in the forward pass only: the output layer is frozen, so the gradient with respect to the hidden states is
known there already, and the backward pass is one multiplication.
"""

from typing import Any, Literal

import torch
from torch import Tensor

CHUNK = 256
"""Positions whose vocabulary logits exist at once."""

Direction = Literal["forward", "reverse"]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        # d log p / d hidden = W[target] - E_p[W]
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = (hidden[rows] @ weight.T).float()
            lse = logits.logsumexp(-1, keepdim=True)
            log_probs[rows] = (logits.gather(-1, target[rows, None]) - lse)[:, 0]
            if slope is not None:
                expected = logits.sub_(lse).exp_().to(weight.dtype) @ weight
                slope[rows] = weight[target[rows]] - expected
        if slope is not None:
            ctx.save_for_backward(slope)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor, weight: Tensor, direction: Direction) -> Tensor:
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = (hidden[rows] @ weight.T).float().log_softmax(-1)
            log_q = (reference[rows] @ weight.T).float().log_softmax(-1)
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None, None


def token_log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log softmax(hidden W^T)[target], position by position.

    Args:
        hidden: last hidden states, shape (positions, width); differentiable.
        weight: W of a frozen output layer without bias, shape (vocabulary, width).
        target: token ids, shape (positions,).

    Returns:
        Nats, shape (positions,), float32.
    """
    found: Tensor = _TokenLogProbs.apply(hidden, weight, target)  # type: ignore[no-untyped-call]
    return found


def divergence(hidden: Tensor, reference: Tensor, weight: Tensor, direction: Direction) -> Tensor:
    """Kullback-Leibler divergence of two next-token distributions over the whole vocabulary, position by position.

    Args:
        hidden: last hidden states of the model, shape (positions, width); differentiable.
        reference: those of the reference, which has the same output layer; no gradient.
        weight: W of that frozen layer without bias, shape (vocabulary, width).
        direction: `reverse`: KL(model || reference), large where the model likes what the reference does not, the
            term of RLHF's and DPO's objective. `forward`: KL(reference || model), large where the model has forgotten
            what the reference likes.

    Returns:
        Nats, shape (positions,), float32, at least 0 up to rounding.
    """
    found: Tensor = _Divergence.apply(hidden, reference, weight, direction)  # type: ignore[no-untyped-call]
    return found
