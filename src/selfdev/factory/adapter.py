"""LoRA adapters: made, and saved so that a folder is whole or not there."""

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from selfdev.errors import SelfdevError


def with_new_adapter(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Put a new adapter on a model, which changes nothing yet; the global random stream is left alone."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, lora)
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter aside and rename it, so that a folder of that name is always whole."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(aside)
    except SafetensorError as error:
        raise SelfdevError(f"{folder} could not be written: {error}; is the disk full?") from error
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
