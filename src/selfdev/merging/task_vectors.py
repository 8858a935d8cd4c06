"""Task vectors: expert minus seed, tensor by tensor, read from safetensors without building a model."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfdev.algorithms.library import Method
from selfdev.errors import UserError

# Projections of the MLP as the families of causal models call them. Routers of mixtures, norms and biases are
# not among them.
_MLP = re.compile(
    r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|dense_h_to_4h|dense_4h_to_h)\.weight$"
    r"|(^|\.)(mlp|feed_forward)\.(c_fc|c_proj|fc_in|fc_out|w1|w2|w3)\.weight$"
    r"|(^|\.)experts\.(\d+\.)?(w1|w2|w3|gate_up_proj|down_proj)(\.weight)?$"
)
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|self_attention|attention)\.(.+\.)?\w+\.weight$")

# Computed from the config when a model is built; old checkpoints carry it all the same.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")

# What makes two models the same architecture, beside the shapes of what is merged. The vocabulary's size is
# not in it: experts often add a token or two, and their layers merge nevertheless.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

_FLOATING = {"F64", "F32", "F16", "BF16"}
_SHOWN_NAMES = 6


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The selected tensors of a seed, and the task vectors of its experts, float32 on the CPU.

    Attributes:
        seed: the seed's tensor of each selected parameter.
        experts: their names, in the order in which `stacked` stacks them.
        vectors: expert minus seed, by parameter and then by expert, in the order of `experts`.
    """

    seed: dict[str, Tensor]
    experts: tuple[str, ...]
    vectors: dict[str, dict[str, Tensor]]

    def stacked(self, parameter: str) -> Tensor:
        """The task vectors of one parameter, shape (experts, *parameter)."""
        return torch.stack([self.vectors[parameter][expert] for expert in self.experts])


def select_targets(names_and_shapes: Mapping[str, tuple[int, ...]], targets: str) -> list[str]:
    """The parameters that are merged, in the order given.

    Args:
        names_and_shapes: every tensor of the model.
        targets: `mlp`, the weights of the MLP projections, those of a mixture's experts included;
            `attention`, the weight matrices of attention; `all`; or a regular expression that is searched for
            in the names.

    Raises:
        UserError: nothing is selected, or the expression is none.
    """
    named = [name for name in names_and_shapes if not _DERIVED.search(name)]
    if targets == "mlp":
        chosen = [name for name in named if _MLP.search(name)]
    elif targets == "attention":
        # Norms of queries and keys lie in the same module and are vectors.
        chosen = [name for name in named if _ATTENTION.search(name) and len(names_and_shapes[name]) >= 2]
    elif targets == "all":
        chosen = named
    else:
        try:
            chosen = [name for name in named if re.search(targets, name)]
        except re.error as error:
            raise UserError(
                f"targets '{targets}' is no regular expression: {error}; "
                "use mlp, attention, all or a valid one"
            ) from None
    if not chosen:
        some = named[:: max(1, len(named) // _SHOWN_NAMES)][:_SHOWN_NAMES]
        raise UserError(
            f"targets '{targets}' selects no parameter; use mlp, attention, all or a regular expression that "
            f"finds some of the model's {len(named)}: {', '.join(some)}"
            + (", ..." if len(some) < len(named) else "")
        )
    return chosen


def read_task_vectors(seed: Path, experts: Mapping[str, Path], targets: str) -> TaskVectors:
    """Read a seed's selected tensors and its experts' task vectors from their folders.

    All configs and headers are compared before the first tensor is read. Tensors that are not selected may
    differ: an expert with a longer vocabulary merges in its layers. The result takes 4 bytes for each
    selected entry, times the number of experts plus one.

    Args:
        seed: a model's folder, safetensors in one file or sharded.
        experts: the experts' folders by name.
        targets: as in `select_targets`.

    Raises:
        UserError: no expert; a folder that is incomplete or damaged; an expert of another architecture;
            nothing selected; weights that are quantised or not finite.
    """
    if not experts:
        raise UserError("there is no expert to merge; name at least one")
    original = _Checkpoint("the seed", seed)
    relatives = {name: _Checkpoint(f"expert '{name}'", folder) for name, folder in experts.items()}
    chosen = select_targets(original.shapes, targets)
    for relative in relatives.values():
        _check_architecture(relative, original)
        _check_tensors(relative, original, chosen, targets)

    base = original.read(chosen)
    vectors: dict[str, dict[str, Tensor]] = {parameter: {} for parameter in chosen}
    for name, relative in relatives.items():
        for parameter, tensor in relative.read(chosen).items():
            vectors[parameter][name] = tensor.sub_(base[parameter])
    return TaskVectors(base, tuple(experts), vectors)


def merge_by_method(method: Method, vectors: TaskVectors, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Merge every parameter by a method of the library.

    A method that draws at random gets a seed of its own for each tensor, made from the value of its parameter
    `seed` and the tensor's name, so that tensors of one shape do not share their drawings.

    Args:
        method: of the library.
        vectors: the task vectors.
        parameters: of the method, by name; those left out take their default.

    Returns:
        The merged task vector of each parameter.

    Raises:
        UserError: an unknown parameter, or one that the method cannot use.
    """
    given = dict(parameters)
    method.check(len(vectors.experts), given)
    drawn = next((each for each in method.parameters if each.name == "seed"), None)
    merged = {}
    for name, tensor in vectors.seed.items():
        if drawn is not None:
            given["seed"] = _seed_of(parameters.get("seed", drawn.default), name)
        merged[name] = method.merge(vectors.stacked(name), tensor, **given)
    return merged


def _seed_of(base: object, name: str) -> int:
    """A number in 0..2^31-1 that depends on both, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{base}/{name}".encode()).digest()[:4], "big") >> 1


class _Checkpoint:
    """A model's folder: its config and the headers of its safetensors. Tensors are read when asked for."""

    def __init__(self, owner: str, folder: Path) -> None:
        """Read config and headers.

        Args:
            owner: whose it is, as the user's messages say it.
            folder: of transformers' format.

        Raises:
            UserError: something is missing or damaged.
        """
        self.owner = owner
        self.folder = folder
        self.config = self._json("config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in self._weight_files():
            with self._opened(file) as weights:
                for name in sorted(weights.keys()):
                    header = weights.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self.types[name] = header.get_dtype()
                    self._files[name] = file

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors as float32, in the order of the names."""
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(self._files[name] for name in names):
            with self._opened(file) as weights:
                for name in names:
                    if self._files[name] == file:
                        # A copy: the mapped file itself is read-only, and may change under us.
                        tensors[name] = weights.get_tensor(name).to(torch.float32, copy=True)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{self.owner}: its '{name}' holds values that are not finite, so the checkpoint in "
                    f"'{self.folder}' is broken; fetch it anew"
                )
        return {name: tensors[name] for name in names}

    def _weight_files(self) -> list[Path]:
        if (self.folder / "model.safetensors.index.json").is_file():
            index = self._json("model.safetensors.index.json")
            files = sorted({self.folder / file for file in index.get("weight_map", {}).values()})
        else:
            files = [self.folder / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{self.owner}: '{self.folder}' has no file '{file.name}'; "
                    "merging reads safetensors as save_pretrained writes them"
                )
        return files

    def _json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / file).read_text())
        except FileNotFoundError:
            raise UserError(f"{self.owner}: '{self.folder}' has no {file}; give a model's folder") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.owner}: '{self.folder / file}' is damaged: {error}; fetch it anew"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"{self.owner}: '{self.folder / file}' is no JSON object; fetch it anew")
        return content

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.owner}: '{file}' is damaged: {error}; fetch it anew") from error


_WAY_OUT = "experts must share the seed's architecture: choose a fine-tuned relative of the seed"


def _check_architecture(expert: _Checkpoint, seed: _Checkpoint) -> None:
    for field in _ARCHITECTURE:
        theirs, ours = expert.config.get(field), seed.config.get(field)
        # Configs written by older versions leave out fields that have a default; the shapes tell then.
        if theirs != ours and (field == "model_type" or None not in (theirs, ours)):
            raise UserError(
                f"{expert.owner}: its config says {field} {theirs} and the seed's says {ours}; {_WAY_OUT}"
            )


def _check_tensors(expert: _Checkpoint, seed: _Checkpoint, chosen: list[str], targets: str) -> None:
    for name in chosen:
        if name not in expert.shapes:
            raise UserError(
                f"{expert.owner}: it has no tensor '{name}' and the seed has one of shape "
                f"{seed.shapes[name]}; {_WAY_OUT}"
            )
        if expert.shapes[name] != seed.shapes[name]:
            raise UserError(
                f"{expert.owner}: its '{name}' has shape {expert.shapes[name]} and the seed's has "
                f"{seed.shapes[name]}; {_WAY_OUT}, or leave this tensor out of the targets"
            )
        for each in (seed, expert):
            if each.types[name] not in _FLOATING:
                raise UserError(
                    f"{each.owner}: its '{name}' is stored as {each.types[name]}, and task vectors need "
                    "floating-point weights; give the unquantised model"
                )
    extra = set(expert.shapes) - set(seed.shapes)
    for name in sorted(extra):
        if _selects(targets, name, expert.shapes[name]):
            raise UserError(
                f"{expert.owner}: it has a tensor '{name}' of shape {expert.shapes[name]} and the seed has "
                f"none; {_WAY_OUT}"
            )


def _selects(targets: str, name: str, shape: tuple[int, ...]) -> bool:
    try:
        return bool(select_targets({name: shape}, targets))
    except UserError:
        return False
