"""Where a model must stop: its end tokens, and the length of its context."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


def context_limit(config: PreTrainedConfig) -> tuple[str, int] | None:
    """The field of the config that limits the context most, and the limit in tokens; None if none does."""
    config = config.get_text_config()
    fields = ("max_position_embeddings", "sliding_window")
    limits = [(field, limit) for field in fields if (limit := getattr(config, field, None)) is not None]
    return min(limits, key=lambda limit: limit[1], default=None)
