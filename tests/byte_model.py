"""A tokenizer of bytes, which can write anything, and a small transformer on it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<eos>": 0} | {byte: i for i, byte in enumerate(alphabet, start=1)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def byte_model(seed: int = 0, context: int = 8192) -> LlamaForCausalLM:
    """Untrained, but sure of itself: what it writes is varied and never close to a tie."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=context,
                eos_token_id=0,
                bos_token_id=None,
                pad_token_id=0,
                initializer_range=0.5,
            )
        ).eval()


def save_byte_model(folder: Path, seed: int = 0, context: int = 8192) -> Path:
    byte_model(seed, context).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
