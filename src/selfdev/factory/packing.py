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

from selfdev.errors import UserError
from selfdev.factory.lora_linear import lean_lora
from selfdev.factory.packed_attention import IMPLEMENTATION, stretches
from selfdev.factory.vocabulary import token_log_probs
from selfdev.models.shared_prefix import OTHER_ARCHITECTURE, alike, attending

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
    flat = token_log_probs(hidden, output_weight(model), target, output_bias(model))
    return list(flat.split([len(completion) for completion in completions]))


def completion_states(model: Model, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
    """The hidden state from which each token of each completion is predicted: the last one, times any scale of logits.

    Args:
        model: a causal language model whose logits are its output layer's, scaled or not (Llama, Mistral, Qwen, SmolLM,
            Phi, Granite, ...), adapted by LoRA or not; `check_training` tells the others.
        prompt: token ids, at least one.
        completions: token ids of each completion, none empty.

    Returns:
        Shape (tokens of all completions, width), differentiable with respect to what is trained.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal.device
    ids, positions = list(prompt), list(range(len(prompt)))
    # Where each completion token is predicted; a first one in a row of its own, in front of all.
    before = list[int]()
    for number, completion in enumerate(completions):
        place = len(completions) + len(ids)
        before += [number, *range(place, place + len(completion) - 1)]
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
    with attending(causal, IMPLEMENTATION), lean_lora(causal):
        hidden: Tensor = causal.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            pack=stretches(len(prompt), [len(completion) for completion in completions]),
        ).last_hidden_state[0]
    # Many are predicted at the prompt's end. Taken from there one by one, their gradients would add up in an order that
    # varies from run to run: on a CPU by hidden[...], on a GPU by index_select. So no row is taken twice.
    ends = hidden[len(prompt) - 1].expand(len(completions), -1)
    states = torch.cat([ends, hidden]).index_select(0, torch.tensor(before, device=device))
    scale = _logit_scale(causal.config)
    return states if scale == 1 else states * scale


def output_weight(model: Model) -> Tensor:
    """The output layer's matrix, shape (vocabulary, width)."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    weight: Tensor = causal.get_output_embeddings().weight
    return weight


def output_bias(model: Model) -> Tensor | None:
    """The output layer's bias, shape (vocabulary,), which few models have: Phi, GPT-J, CodeGen."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    bias: Tensor | None = getattr(causal.get_output_embeddings(), "bias", None)
    return bias


def _logit_scale(config: Any) -> float:
    """What a model multiplies its output layer's logits by: Cohere and Granite do, in opposite words."""
    config = config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(factor or 1.0) / float(divisor or 1.0)


def check_training(model: PreTrainedModel) -> None:
    """Compare packed log-probabilities with those of the model's own logits, on a few tokens.

    An architecture with attention or an output of its own would not complain, only be trained wrongly.

    Raises:
        UserError: they differ, or there are none.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [(7 * i + 1) % vocabulary for i in range(9)]
    prompt, completions = tokens[:4], [tokens[4:6], tokens[6:]]
    cause: Exception | None = None
    with torch.no_grad():
        try:
            packed = completion_log_probs(model, prompt, completions)
            right = all(_as_plain(model, prompt, *each) for each in zip(completions, packed, strict=True))
        except torch.OutOfMemoryError:
            raise
        except (UserError, *OTHER_ARCHITECTURE) as error:
            right, cause = False, error
    if not right:
        raise UserError(
            f"factory.model: a {type(model).__name__} ({model.config.model_type}) cannot be trained here: packed, its "
            "log-probabilities are not those of its own logits. Set refinement.backend: trl, which takes the model's "
            "own (with refinement.imitation.passes: 0 and factory.warm_start.steps: 0, in which TRL has no part), take "
            "a model of another family, or set refinement.refit: never"
        ) from cause


def _as_plain(model: PreTrainedModel, prompt: list[int], completion: list[int], packed: Tensor) -> bool:
    """Whether the log-probabilities of a completion are those of a plain pass."""
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return alike(packed, expected, logits, model.dtype)


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
