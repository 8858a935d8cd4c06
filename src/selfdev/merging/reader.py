"""A model's folder as merging reads it: its config, and its tensors one at a time."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfdev.errors import UserError
from selfdev.merging.targets import count_layers, of_vocabulary
from selfdev.models.adapter import Adapter
from selfdev.models.gguf import noted_source
from selfdev.models.sources import Located
from selfdev.models.weights import Damaged, Entry, WeightFile

INDEX = "model.safetensors.index.json"
# Index of shards and single file of each format, in transformers' order of preference; of one format, the single file
# comes first. The Hub's snapshots have the other format's index all the same.
_KINDS = ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


class Checkpoint:
    """A model's folder. Tensors are memory-mapped: nothing of them is read before it is asked for.

    Attributes:
        owner: whose it is, as the user's messages say it.
        folder: where it lies.
        config: what its config.json holds.
        shapes: of its tensors by name.
        types: of its tensors as stored, such as `BF16`.
    """

    def __init__(self, owner: str, folder: Path, *, pickled: bool = False) -> None:
        """Read config and headers.

        Args:
            owner: whose it is, as the user's messages say it.
            folder: of transformers' format.
            pickled: whether `pytorch_model*.bin` will do where there is no safetensors; these are opened by
                torch's weights-only loader.

        Raises:
            UserError: something is missing or damaged.
        """
        self.owner = owner
        self.folder = folder
        self.config = self._json("config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._files: dict[str, WeightFile] = {}
        self._stored_as: dict[str, str] = {}
        files, index, self._index = self._weight_files(pickled)
        for path in files:
            file = self._opened(path)
            for name, entry in file.entries.items():
                if index.get(name, path.name) != path.name:
                    continue  # a copy that nobody reads
                self.shapes[name] = entry.shape
                self.types[name] = entry.dtype
                self._files[name] = file
        if missing := sorted(index.keys() - self.shapes.keys()):
            raise UserError(
                f"{self.owner}: the index in '{folder}' names '{missing[0]}', which is in none of its files "
                f"({len(missing)} missing in all); fetch it anew"
            )

    @property
    def files(self) -> list[Path]:
        """Its config, the index of its shards if it has one, and its files of weights in the order of their names."""
        weights = sorted({file.path for file in self._files.values()})
        return [self.folder / "config.json", *([self._index] if self._index else []), *weights]

    def made_of(self) -> dict[str, str]:
        """What its files of weights were made of, if that is known: a sha256 by a name of it."""
        digest = noted_source(self.folder)
        return {"GGUF file": digest} if digest else {}

    def order(self) -> list[str]:
        """The names of its tensors as they lie in the files, so that reading in this order is sequential."""
        return sorted(self.shapes, key=lambda name: (self._files[name].path, self.entry(name).begin, name))

    def path(self, name: str) -> Path:
        """The file in which a tensor lies."""
        return self._files[name].path

    def entry(self, name: str) -> Entry:
        """Where in its file a tensor lies, and as what."""
        return self._files[name].entries[self._stored_as.get(name, name)]

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor as it is stored. Read only, and unread before it is used."""
        return self._files[name].tensor(self._stored_as.get(name, name))

    def entries(self, name: str, shape: Sequence[int], begin: int = 0, step: int = 1) -> Tensor:
        """As many entries of a tensor as the shape has, from `begin` on in the order of storage, or each `step`th."""
        count = math.prod(shape)
        # Few operations: with several threads at work each costs a turn of the interpreter's lock.
        found = self._files[name].flat(self._stored_as.get(name, name))[begin : begin + count * step : step]
        return found if len(shape) == 1 else found.view(shape)

    def in_parts(self, name: str) -> bool:
        """Whether `entries` and `task_vector` take no longer for the parts of a tensor than for all of it."""
        return self.tensor(name).is_contiguous()

    def task_vector(self, name: str, seed: Tensor, out: Tensor, begin: int = 0, step: int = 1) -> None:
        """Write this model's tensor minus the seed's into `out`, in float32.

        Args:
            name: of the tensor.
            seed: the seed's tensor, float32; its first rows, where a vocabulary is cropped; or flat, a part of these.
            out: of the same shape, float32.
            begin: entry at which the part begins. Only with `in_parts`.
            step: which entries from there on the part has: all, or each `step`th.
        """
        out.copy_(self.entries(name, seed.shape, begin, step)).sub_(seed)

    def release(self, name: str) -> None:
        """Let go of the memory of a tensor's pages."""
        self._files[name].release(self._stored_as.get(name, name))

    def forget(self, name: str, end: int | None = None) -> None:
        """Let the system's cache forget a released tensor too, up to an entry or all of it."""
        self._files[name].forget(self._stored_as.get(name, name), end)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors as float32, in memory of their own.

        Raises:
            UserError: one of them is not finite.
        """
        tensors = {}
        for name in names:
            tensors[name] = self.tensor(name).to(torch.float32, copy=True)
            self.release(name)
            self.check_finite(name, tensors[name])
        return tensors

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise UserError if a tensor of this model holds NaN or infinity."""
        if not is_finite(tensor):
            raise UserError(
                f"{self.owner}: its '{name}' holds values that are not finite, so the checkpoint in "
                f"'{self.folder}' is broken; fetch it anew"
            )

    def check_stored(self, name: str) -> None:
        """Raise UserError if what a tensor is made of holds NaN or infinity."""
        self.check_finite(name, self.tensor(name))

    def alias(self, name: str, stored_as: str) -> None:
        """Let `name` stand for the tensor `stored_as` as well."""
        self.shapes[name], self.types[name] = self.shapes[stored_as], self.types[stored_as]
        self._files[name] = self._files[stored_as]
        self._stored_as[name] = stored_as

    def layers(self, names: Iterable[str]) -> int:
        """How many layers the model has, by its config, or by the names of its tensors."""
        inner = self.config.get("text_config")
        for part in (self.config, inner if isinstance(inner, dict) else {}):
            for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
                if isinstance(part.get(key), int) and part[key] > 0:
                    return int(part[key])
        return count_layers(names)

    def _weight_files(self, pickled: bool) -> tuple[list[Path], dict[str, str], Path | None]:
        """The files and, where an index names them, the name of each tensor's, and the index."""
        files, places, used = [self.folder / _KINDS[0][1]], dict[str, str](), None
        for index, single in _KINDS[: 2 if pickled else 1]:
            if (self.folder / single).is_file():
                files = [self.folder / single]
                break
            if (self.folder / index).is_file():
                weight_map = self._json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise UserError(f"{self.owner}: '{self.folder / index}' maps no weights; fetch it anew")
                places = {str(name): Path(str(file)).name for name, file in weight_map.items()}
                files, used = sorted({self.folder / file for file in places.values()}), self.folder / index
                break
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{self.owner}: '{self.folder}' has no file '{file.name}'; "
                    "merging reads safetensors as save_pretrained writes them"
                )
        return files, places, used

    def _json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / file).read_text())
        except FileNotFoundError:
            raise UserError(f"{self.owner}: '{self.folder}' has no {file}; give a model's folder") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self.owner}: '{self.folder / file}' is damaged: {error}; fetch it anew"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"{self.owner}: '{self.folder / file}' is no JSON object; fetch it anew")
        return content

    def _opened(self, path: Path) -> WeightFile:
        try:
            return WeightFile(path)
        except (Damaged, OSError) as error:
            raise UserError(f"{self.owner}: '{path}' is damaged: {error}; fetch it anew") from None


class AdaptedCheckpoint(Checkpoint):
    """A LoRA adapter on its base, read as the model that the two make."""

    def __init__(
        self, owner: str, base: Path, adapter: Path, *, on_seed: bool, pickled: bool = False
    ) -> None:
        """Read configs and headers.

        Args:
            owner: whose it is, as the user's messages say it.
            base: folder of the model that the adapter was trained on.
            adapter: folder of the adapter.
            on_seed: whether the base is the seed of the merge. The adapter's update then is the task vector,
                without the rounding of adding it to the base and taking the base away again.
            pickled: as for `Checkpoint`.

        Raises:
            UserError: something is missing or damaged, or the two do not fit.
        """
        super().__init__(owner, base, pickled=pickled)
        if self.config.get("quantization_config"):  # what is packed has other shapes than the adapter's
            raise UserError(
                f"{owner}: its adapter was trained on '{base}', whose weights are quantised; name the model that these "
                f"were quantised from as its base, {adapter}+BASE"
            )
        self._adapter = Adapter(owner, adapter)
        self._adapter.attach(self.shapes, str(self.config.get("model_type")), of_vocabulary)
        self.shapes |= self._adapter.resized
        self._on_seed = on_seed

    @property
    def files(self) -> list[Path]:
        """What makes its weights: the adapter's, its config, and the base's unless that is the seed."""
        return [self._adapter.config_file, self._adapter.file, *([] if self._on_seed else super().files)]

    def made_of(self) -> dict[str, str]:
        return {} if self._on_seed else super().made_of()

    def check_stored(self, name: str) -> None:
        super().check_stored(name)
        stored = self._stored_as.get(name, name)
        if not all(map(is_finite, self._adapter.parts(stored))):
            raise UserError(
                f"{self.owner}: what its adapter adds to '{name}' is not finite, so '{self._adapter.file}' is broken; "
                "fetch it anew"
            )

    def in_parts(self, name: str) -> bool:
        return super().in_parts(name) and not self._adapter.changes(self._stored_as.get(name, name))

    def task_vector(self, name: str, seed: Tensor, out: Tensor, begin: int = 0, step: int = 1) -> None:
        stored = self._stored_as.get(name, name)
        replacement = self._adapter.replacement(stored)
        if replacement is not None:
            out.copy_(replacement[: len(seed)]).sub_(seed)
        elif self._on_seed:
            out.zero_()
        else:
            super().task_vector(name, seed, out, begin, step)
        self._adapter.add_update(stored, out)


def open_expert(name: str, found: Located, seed: Path, *, pickled: bool = False) -> Checkpoint:
    """An expert as merging reads it, a whole model or an adapter on its base.

    Args:
        name: the expert's.
        found: where it lies.
        seed: the seed's folder.
        pickled: as for `Checkpoint`.

    Raises:
        UserError: something is missing or damaged, or adapter and base do not fit.
    """
    owner = f"expert '{name}'"
    if found.adapter is None:
        return Checkpoint(owner, found.folder, pickled=pickled)
    on_seed = found.folder.resolve() == seed.resolve()
    return AdaptedCheckpoint(owner, found.folder, found.adapter, on_seed=on_seed, pickled=pickled)


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor has neither NaN nor infinity, also once it is rounded to a type, found without a copy of it."""
    if not tensor.numel():
        return True
    low, high = (
        end.item() for end in torch.aminmax(tensor)
    )  # NaN passes through both, and rounding keeps the order
    if (dtype or tensor.dtype) in _REACH:
        reach = _REACH[dtype or tensor.dtype]
        return bool(-reach < low <= high < reach)
    return all(math.isfinite(torch.tensor(end, dtype=dtype or tensor.dtype).item()) for end in (low, high))


_REACH = {
    torch.float32: math.inf,
    torch.bfloat16: (2 - 2**-8) * 2.0**127,
    torch.float16: (2 - 2**-11) * 2.0**15,
}
"""From here on numbers are rounded to infinity: half way from the largest one to what would follow it."""
