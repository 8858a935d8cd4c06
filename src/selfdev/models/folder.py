"""A model's folder in transformers' format: its weights' hash, and loading it without noise.

Weights are read from safetensors alone: a pickled checkpoint can run code when it is opened.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from selfdev.errors import UserError
from selfdev.models.adapter import Adapter, adapter_files

_CHUNK_BYTES = 1 << 20

# What transformers, tokenizers and safetensors raise on a folder that is incomplete or damaged.
_BROKEN_FOLDER = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


def weights_hash(folder: Path, adapter: Path | None = None) -> str:
    """The identity of a model's weights, 64 hex digits.

    It is the sha256 of its safetensors files one after the other, in the order of their names: for a single
    file what `sha256sum` prints; where there are none, of `pytorch_model*.bin`. Those of a LoRA adapter and its config
    come after those of its base. Files that stay as they are, by size and time, are read once.

    Raises:
        UserError: a folder holds no weights.
    """
    kinds = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors")
    files: list[Path] = next(filter(None, (sorted(folder.glob(kind)) for kind in kinds)), [])
    if not files:
        raise UserError(f"'{folder}' holds no *.safetensors file; save the model with save_pretrained")
    if adapter is not None:
        files += adapter_files(adapter)
    found = [(file, file.stat()) for file in files]
    return _hash(tuple((file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in found))


@functools.cache
def _hash(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Of files with their inode, size and time of writing."""
    digest = hashlib.sha256()
    for file, *_ in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def load_model(folder: Path, dtype: torch.dtype = torch.float32, adapter: Path | None = None) -> Any:
    """Load a causal language model on the CPU, in evaluation mode, none of its parameters trainable.

    Args:
        folder: what `resolve` returned.
        dtype: the parameters' type, whatever type they are stored in.
        adapter: folder of a LoRA adapter on it, which is added in float32 and rounded to `dtype`.

    Raises:
        UserError: the folder is incomplete, damaged, or of an architecture that transformers does not know; or the
            adapter does not fit.
    """
    with quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except _BROKEN_FOLDER as error:
            raise UserError(
                f"model '{folder}' cannot be loaded: {_reason(error)}; fetch or save the model anew"
            ) from error
    # transformers fills what is missing with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model '{folder}' lacks {len(missing)} of its tensors, '{missing[0]}' for one; "
            "fetch or save the model anew"
        )
    model.requires_grad_(False).eval()
    if adapter is not None:
        _add(Adapter(f"adapter '{adapter}'", adapter), model)
    return model


def _add(adapter: Adapter, model: Any) -> None:
    """Make the base of an adapter the model that the two are."""
    parameters = dict(model.named_parameters())
    try:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        adapter.attach(shapes, model.config.model_type)
    except UserError as error:
        raise UserError(
            f"{error}\nIf it has rows for tokens that were added, make one model of both first: `selfdev merge "
            "--method linear --targets all --seed BASE --expert lora=ADAPTER --out DIR`"
        ) from error
    for name, parameter in parameters.items():
        if adapter.changes(name):
            whole = adapter.replacement(name)
            tensor = (parameter if whole is None else whole).to(torch.float32, copy=True)
            adapter.add_update(name, tensor)
            parameter.copy_(tensor)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that lies beside the model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # The tokenizers library raises bare Exception on a damaged file.
        except Exception as error:
            raise UserError(
                f"the tokenizer of '{folder}' cannot be loaded: {_reason(error)}; "
                "put the tokenizer's files beside the weights"
            ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error; transformers' messages go on for paragraphs."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the user's screen."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
