"""Many completions of one prompt in one pass in which the prompt stands once.

The packed sequence is the prompt and then the completions; a token sees the prompt and its own completion, and its
position is the one it would have alone. So hidden states and log-probabilities are those of separate passes, at a
fraction of the cost when the prompt is longer than the completions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfdev.factory.vocabulary import token_log_probs


def completion_log_probs(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of every token of every completion, given the prompt and what precedes it.

    Args:
        model: see `completion_states`.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        For each completion a tensor of shape (tokens,), in nats, differentiable with respect to the adapter.
    """
    hidden = completion_states(model, prompt, completions)
    target = torch.tensor([token for each in completions for token in each], device=hidden.device)
    flat = token_log_probs(hidden, output_weight(model), target)
    return list(flat.split([len(completion) for completion in completions]))


def completion_states(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], completions: Sequence[Sequence[int]]
) -> Tensor:
    """The last hidden state from which each token of each completion is predicted.

    Args:
        model: a causal language model whose logits are a linear function of its last hidden state, without bias,
            scale or cap (Llama, Mistral, Qwen, SmolLM, ...), adapted by LoRA or not; its output layer is frozen.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        Shape (tokens of all completions, width), differentiable with respect to the adapter.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal.device
    ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    before = list[int]()  # where each completion token is predicted
    for number, completion in enumerate(completions, start=1):
        before += [len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
        segments += [number] * len(completion)
    hidden: Tensor = causal.base_model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=_mask(torch.tensor(segments, device=device), causal.dtype),
        use_cache=False,
    ).last_hidden_state[0]
    # Not hidden[before]: its gradient adds up in an order that varies from run to run, this one's does not.
    return hidden.index_select(0, torch.tensor(before, device=device))


def output_weight(model: PreTrainedModel | PeftModel) -> Tensor:
    """The output layer's matrix, shape (vocabulary, width)."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    weight: Tensor = causal.get_output_embeddings().weight
    return weight


def passes(prompt: int, completions: Sequence[int], tokens_a_pass: int | None) -> list[range]:
    """Share completions out to passes of limited size, in their order.

    Args:
        prompt: its length in tokens; every pass holds it once.
        completions: the length of each, in tokens.
        tokens_a_pass: the most that a pass may hold; one completion that is longer has a pass to itself. None: all
            completions make one pass.

    Returns:
        For each pass the indices of its completions.
    """
    if tokens_a_pass is None:
        return [range(len(completions))]
    starts, held = [0], prompt
    for index, length in enumerate(completions):
        if held + length > tokens_a_pass and index > starts[-1]:
            starts.append(index)
            held = prompt
        held += length
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(completions)], strict=True)]


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and the lowest number elsewhere, shape (1, 1, tokens, tokens)."""
    same = segments[:, None] == segments[None, :]
    sees = (same | (segments[None, :] == 0)).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )[None, None]
