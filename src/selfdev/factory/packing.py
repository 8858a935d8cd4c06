"""Many completions of one prompt in one pass in which the prompt stands once.

The packed sequence is the prompt and then the completions; a token sees the prompt and its own completion, and its
position is the one it would have alone. So hidden states and log-probabilities are those of separate passes, at a
fraction of the cost when the prompt is longer than the completions.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfdev.factory.lora_linear import lean_lora
from selfdev.factory.packed_attention import IMPLEMENTATION, stretches
from selfdev.factory.vocabulary import token_log_probs
from selfdev.models.shared_prefix import attending

Model: TypeAlias = PreTrainedModel | PeftModel


def completion_log_probs(
    model: Model, prompt: Sequence[int], completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of every token of every completion, given the prompt and what precedes it.

    Args:
        model: see `completion_states`.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        For each completion a tensor of shape (tokens,), in nats, differentiable with respect to what is trained.
    """
    hidden = completion_states(model, prompt, completions)
    target = torch.tensor([token for each in completions for token in each], device=hidden.device)
    flat = token_log_probs(hidden, output_weight(model), target)
    return list(flat.split([len(completion) for completion in completions]))


def completion_states(model: Model, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
    """The last hidden state from which each token of each completion is predicted.

    Args:
        model: a causal language model whose logits are a linear function of its last hidden state, without bias,
            scale or cap (Llama, Mistral, Qwen, SmolLM, ...), adapted by LoRA or not.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        Shape (tokens of all completions, width), differentiable with respect to what is trained.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal.device
    ids, positions = list(prompt), list(range(len(prompt)))
    before = list[int]()  # where each completion token is predicted
    for completion in completions:
        before += [len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
    with attending(causal, IMPLEMENTATION), lean_lora(causal):
        hidden: Tensor = causal.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            pack=stretches(len(prompt), [len(completion) for completion in completions]),
        ).last_hidden_state[0]
    # Not hidden[before]: its gradient adds up in an order that varies from run to run, this one's does not.
    return hidden.index_select(0, torch.tensor(before, device=device))


def output_weight(model: Model) -> Tensor:
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
