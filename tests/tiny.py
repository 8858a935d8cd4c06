"""A real transformer small enough for a test: two layers of 32 units on the nano zoo's characters."""

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from selfdev.zoo import zoo_models


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(zoo_models("nano")["seed"])


def tiny_model(vocabulary: int = 64, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                eos_token_id=None,
                bos_token_id=None,
                initializer_range=0.3,  # sharp logits, so that differences show
            )
        ).eval()
