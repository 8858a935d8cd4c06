"""Where a model must stop: its end tokens, and the length of its context."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


CONTEXT, WINDOW = "max_position_embeddings", "sliding_window"


def context_limit(config: PreTrainedConfig, *fields: str) -> tuple[str, int] | None:
    """The field of the config that limits a text most, and the limit in tokens; None if none does.

    Args:
        config: the model's.
        fields: those that count. `CONTEXT` is how long a text may be. `WINDOW` is how far back some layers see, if not
            to the beginning, which only the model's own attention knows: where ours takes its place no text may be
            longer.
    """
    config = config.get_text_config()
    limits = [(field, limit) for field in fields if (limit := getattr(config, field, None)) is not None]
    return min(limits, key=lambda limit: limit[1], default=None)
