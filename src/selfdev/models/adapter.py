"""LoRA adapters as peft saves them (Hu et al. 2021, arXiv 2106.09685): what one adds to each tensor of its base.

    W' = W + s B A,    s = alpha / rank, or alpha / sqrt(rank) where the config says `use_rslora`

Tensors that were trained whole (`modules_to_save`, biases) lie in the adapter as they are, and take the base's place.
DoRA, factors with a bias, and other kinds of adapters are refused: peft's `merge_and_unload` makes models of them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfdev.errors import UserError
from selfdev.models.weights import Damaged, WeightFile

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?$")
_OTHER_KINDS = re.compile(
    r"\.lora_magnitude_vector|\.lora_[AB]\.bias$|\.lora_\w+|\.(ia3|vera|oft|boft|hada)_"
)
_CHANGING_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_OTHER_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
)
# Architectures made of transformers' Conv1D, which stores matrices the other way round than a linear layer, and the
# modules that are. An adapter's own `fan_in_fan_out` is that of its last module alone.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
_WAY_OUT = "merge it into its base with peft's merge_and_unload and give that model"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and no whole model; some trainers put the base's config beside it."""
    whole = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return (folder / CONFIG).is_file() and not whole


def adapter_base(folder: Path) -> str:
    """The model that an adapter was trained on, as its config names it, with its revision; empty if it does not.

    Raises:
        UserError: the config is damaged, or of a kind of adapter that is not read.
    """
    config = _read_config(folder, f"adapter '{folder}'")
    name, revision = (str(config.get(key) or "") for key in ("base_model_name_or_path", "revision"))
    # Of a folder there is but what lies in it.
    return f"{name}@{revision}" if revision not in ("", "main") and not Path(name).is_dir() else name


def adapter_files(folder: Path) -> list[Path]:
    """The file of an adapter's weights, and its config.

    Raises:
        UserError: there are no weights.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"adapter '{folder}' has no {' and no '.join(_FILES)}; fetch it anew")
    return [path, folder / CONFIG]


@dataclass(frozen=True)
class _Update:
    """s B A of one tensor: names of the factors in the file, the scale, and whether the product is transposed."""

    a: str
    b: str
    scale: float
    transposed: bool


class Adapter:
    """An adapter's folder.

    Attributes:
        owner: whose it is, as the user's messages say it.
        file: of its weights.
        config_file: which says how much of them is added.
        resized: once it is attached, shapes of the tensors that have other numbers of rows than the base's.
    """

    def __init__(self, owner: str, folder: Path) -> None:
        """Read config and headers.

        Raises:
            UserError: it is incomplete, damaged, or of a kind that is not read.
        """
        self.owner = owner
        self._config = _read_config(folder, owner)
        path, self.config_file = adapter_files(folder)
        try:
            self._weights = WeightFile(path)
        except (Damaged, OSError) as error:
            raise UserError(f"{owner}: '{path}' is damaged: {error}; fetch it anew") from None
        self.file = path
        self._updates: dict[str, _Update] = {}
        self._replacements: dict[str, str] = {}
        self.resized: dict[str, tuple[int, ...]] = {}

    def attach(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        architecture: str,
        of_vocabulary: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Find the tensor that each of the adapter's belongs to.

        Args:
            shapes: of the base's tensors by name.
            architecture: of the base, its config's `model_type`.
            of_vocabulary: whether a tensor has a row for each token. One that takes the base's place may have more
                rows, for tokens that were added; and a head that repeats such embeddings needs no place in a base that
                ties the two.

        Raises:
            UserError: the base has no such tensor, or one of another shape.
        """
        heads = list[str]()
        factors: dict[str, dict[str, str]] = {}
        for key in self._weights.entries:
            factor = _FACTOR.fullmatch(key)
            if factor:
                factors.setdefault(factor["module"], {})[factor["which"]] = key
            elif _OTHER_KINDS.search(key):
                raise UserError(
                    f"{self.owner}: its adapter holds '{key}', which is no plain LoRA; {_WAY_OUT}"
                )
            else:
                plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                if of_vocabulary(plain) and not self._places(plain, shapes):
                    heads.append(key)
                    continue
                name, shape = self._name_in_base(plain, shapes), self._weights.entries[key].shape
                if of_vocabulary(name) and shape[1:] == shapes[name][1:] and shape != shapes[name]:
                    self.resized[name] = shape
                else:
                    self._check_shape(name, shape, shapes)
                self._replacements[name] = key
        for head in heads:
            if not any(
                self._repeats(head, key) for name, key in self._replacements.items() if of_vocabulary(name)
            ):
                raise UserError(
                    f"{self.owner}: its adapter trained an output head '{head}' of its own, and its base ties the head "
                    f"to the embeddings; {_WAY_OUT}"
                )
        for module, keys in factors.items():
            self._attach_factors(module, keys, shapes, architecture)

    def _repeats(self, one: str, other: str) -> bool:
        return torch.equal(self._weights.tensor(one), self._weights.tensor(other))

    def changes(self, name: str) -> bool:
        """Whether the tensor is another than the base's."""
        return name in self._replacements or name in self._updates

    def replacement(self, name: str) -> Tensor | None:
        """The tensor that takes the base's place, as it is stored; None if the base's stays."""
        key = self._replacements.get(name)
        return None if key is None else self._weights.tensor(key)

    def parts(self, name: str) -> list[Tensor]:
        """What is stored for a tensor."""
        update, whole = self._updates.get(name), self._replacements.get(name)
        keys = [update.a, update.b] if update else []
        return [self._weights.tensor(key) for key in [*keys, *([whole] if whole else [])]]

    def add_update(self, name: str, out: Tensor) -> None:
        """Add the adapter's update of a tensor to `out`, float32, of the tensor's shape or its first rows."""
        update = self._updates.get(name)
        if update is None:
            return
        a, b = (self._weights.tensor(key).to(torch.float32) for key in (update.a, update.b))
        left, right = (a.T, b.T) if update.transposed else (b, a)
        out.addmm_(left[: len(out)], right, alpha=update.scale)

    def _attach_factors(
        self,
        module: str,
        keys: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        architecture: str,
    ) -> None:
        if keys.keys() != {"A", "B"}:
            raise UserError(f"{self.owner}: its adapter has but one factor for '{module}'; fetch it anew")
        a, b = self._weights.entries[keys["A"]].shape, self._weights.entries[keys["B"]].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(
                f"{self.owner}: its factors of '{module}' have shapes {a} and {b}, which is no plain LoRA; {_WAY_OUT}"
            )
        transposed = bool(self._config.get("fan_in_fan_out"))
        if architecture in _CONV1D:
            transposed = module.rpartition(".")[2] in _CONV1D_MODULES
        transposed |= "lora_embedding_" in keys["A"]
        name = self._name_in_base(f"{module}.weight", shapes)
        self._check_shape(name, (a[1], b[0]) if transposed else (b[0], a[1]), shapes)
        self._updates[name] = _Update(keys["A"], keys["B"], self._scale(module, a[0]), transposed)

    def _scale(self, module: str, rank: int) -> float:
        try:
            alpha = float(self._config.get("lora_alpha", rank))
            for pattern, value in (self._config.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module.removeprefix(_PREFIX)):
                    alpha = float(value)
                    break
            return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
            raise UserError(
                f"{self.owner}: the rank {rank} of its '{module}', or lora_alpha or alpha_pattern in "
                f"'{self.config_file}', makes no scale: {error}; fetch it anew"
            ) from None

    def _name_in_base(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The base's name for a tensor."""
        name, found = key.removeprefix(_PREFIX), self._places(key, shapes)
        if len(found) != 1:
            raise UserError(
                f"{self.owner}: its adapter changes '{name}', and its base has {len(found) or 'no'} such "
                f"tensor{'s' if found else ''}; name the base that it was trained on as ADAPTER+BASE"
            )
        return found[0]

    @staticmethod
    def _places(key: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The base's names that a tensor may mean, whether or not one of the two has the model's prefix in front."""
        name = key.removeprefix(_PREFIX)
        found = [name] if name in shapes else [each for each in shapes if each.endswith(f".{name}")]
        shorter = name.partition(".")[2]
        return found or ([shorter] if shorter in shapes else [])

    def _check_shape(self, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shape != shapes[name]:
            raise UserError(
                f"{self.owner}: its adapter changes '{name}' as of shape {shape}, and its base's has {shapes[name]}; "
                "name the base that it was trained on as ADAPTER+BASE"
            )


def _read_config(folder: Path, owner: str) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{owner}: '{file}' is damaged: {error}; fetch it anew") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{owner}: '{file}' is of kind {kind}, and LORA is what is read; {_WAY_OUT}")
    for field in _OTHER_LORA:
        if config.get(field):
            raise UserError(f"{owner}: '{file}' says {field}, which is no plain LoRA; {_WAY_OUT}")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGING_THE_BASE):
        raise UserError(
            f"{owner}: '{file}' says init_lora_weights {start}, for which peft changes the base's own weights; "
            + _WAY_OUT
        )
    return dict(config)
