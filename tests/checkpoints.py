"""Model folders for the tests of merging: small dictionaries of tensors, and a transformer that really loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfdev.zoo import zoo_models

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"model_type": "llama", "hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 2}
TENSORS = {
    UP: torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    DOWN: torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.5, 0.0]]),
    NORM: torch.ones(2),
    TABLE: torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]),
}


def write(
    folder: Path,
    changes: Mapping[str, Tensor | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    **config: object,
) -> Path:
    """A folder with the tensors above, some replaced, added or (None) left out."""
    given = TENSORS | dict(changes or {})
    tensors = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or several."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def relative(source: Path, folder: Path, seed: int, size: float = 0.05) -> Path:
    """A copy of a model with small noise on every tensor."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        noise = size * torch.randn(tensor.shape, generator=generator)
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def nano_seed() -> Path:
    """A transformer that loads in a moment, with its tokenizer."""
    return zoo_models("nano")["seed"]
