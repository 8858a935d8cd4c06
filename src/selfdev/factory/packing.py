"""Log-probabilities of many completions of one prompt, in one pass in which the prompt stands once.

The packed sequence is the prompt and then the completions; a token sees the prompt and its own completion, and its
position is the one it would have alone. So the log-probabilities are those of separate passes, at a fraction of the
cost when the prompt is longer than the completions.

Vocabulary logits are the largest tensors of such a pass. Here they exist for `CHUNK` positions at a time, in the
forward pass only: the output layer is frozen, so its gradient with respect to the hidden states is known there
already, and the backward pass is one multiplication.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

CHUNK = 256
"""Positions whose vocabulary logits exist at once."""


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T)[target], row by row, for a frozen W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Shapes: hidden (positions, width), weight (vocabulary, width), target (positions,); returns (positions,)."""
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


def completion_log_probs(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of every token of every completion, given the prompt and what precedes it.

    Args:
        model: a causal language model whose logits are a linear function of its last hidden state, without bias,
            scale or cap (Llama, Mistral, Qwen, SmolLM, ...), adapted by LoRA or not; its output layer is frozen.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        For each completion a tensor of shape (tokens,), in nats, differentiable with respect to the adapter.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal.device
    ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    before, target = list[int](), list[int]()  # where each completion token is predicted, and what it is
    for number, completion in enumerate(completions, start=1):
        before += [len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
        target += completion
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
        segments += [number] * len(completion)
    hidden = causal.base_model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=_mask(torch.tensor(segments, device=device), causal.dtype),
        use_cache=False,
    ).last_hidden_state[0]
    flat = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        # Not hidden[before]: its gradient adds up in an order that varies from run to run, this one's does not.
        hidden.index_select(0, torch.tensor(before, device=device)),
        causal.get_output_embeddings().weight,
        torch.tensor(target, device=device),
    )
    return list(flat.split([len(completion) for completion in completions]))


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and the lowest number elsewhere, shape (1, 1, tokens, tokens)."""
    same = segments[:, None] == segments[None, :]
    sees = (same | (segments[None, :] == 0)).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )[None, None]
