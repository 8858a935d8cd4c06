"""What a factory has learned, an adapter or all of its weights: saved so that a folder is whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from selfdev.disk import flush
from selfdev.errors import SelfdevError
from selfdev.factory.optimiser import Moments
from selfdev.factory.packing import Model
from selfdev.models.folder import quiet

_MOMENTS = Path("optimizer") / "moments.safetensors"
"""In a folder of its own, since the safetensors files beside each other are the model's weights."""


def with_new_adapter(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Put a new adapter on a model, which changes nothing yet; the global random stream is left alone."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every GPU too
        adapted: PeftModel = get_peft_model(model, lora)
    return adapted


def with_adapter(model: PreTrainedModel, folder: Path, *, trained: bool = False) -> PeftModel:
    """Put an adapter that was saved on a model, to be merged into it or to be trained further."""
    # PEFT itself would read it to a GPU, if there is one.
    place = str(model.device)
    adapted: PeftModel = PeftModel.from_pretrained(model, folder, is_trainable=trained, torch_device=place)
    return adapted


def save_learned(model: Model, folder: Path, moments: Moments | None = None) -> None:
    """Save what was trained aside and rename it, so that a folder of that name is always whole.

    Args:
        model: one with an adapter, which alone is saved, or one that was trained as a whole.
        folder: to be written.
        moments: of the optimiser, where a later round goes on with them.

    Raises:
        SelfdevError: it cannot be written.
    """
    aside = _aside(folder)
    if isinstance(model, PreTrainedModel) and (asked := model.generation_config) is not None:
        # How its makers would sample is not ours, and may be what transformers does not save.
        ends = {name: getattr(asked, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ends)
    try:
        with quiet():
            model.save_pretrained(aside)
        if moments is not None:
            (aside / _MOMENTS).parent.mkdir()
            save_file(dict(moments), aside / _MOMENTS)
        for written in (*aside.rglob("*"), aside):  # before the archive names it: a power cut must not cut it
            flush(written)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise SelfdevError(f"{folder} could not be written: {error}; is the disk full?") from error
    move_learned(aside, folder)


def move_learned(made: Path, folder: Path) -> None:
    """Give what was saved on the same disk its place."""
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    flush(folder.parent)


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder for what is made on the way to another, on the same disk; gone afterwards."""
    aside = _aside(folder)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """The name, free, under which this process makes what is to be `folder`; `remove_left` knows it."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return aside


def remove_left(folder: Path) -> None:
    """Remove what processes left that were killed while they saved to `folder`, which only one does at a time."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def load_moments(folder: Path) -> Moments:
    """The optimiser's moments that were saved with what was learned.

    Raises:
        SelfdevError: they are not there.
    """
    file = folder / _MOMENTS
    if not file.is_file():
        raise SelfdevError(
            f"'{file}', with which refinement.optimizer: continue goes on, is not there; put it back, or begin the run "
            "anew"
        )
    found: Moments = load_file(file)
    return found
