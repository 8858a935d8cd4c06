"""Task vectors: expert minus seed, tensor by tensor, read from safetensors without building a model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfdev.algorithms.library import Method
from selfdev.errors import UserError
from selfdev.merging.compatibility import check_architecture, check_tensors, warn_of_computation
from selfdev.merging.reader import Checkpoint, open_expert
from selfdev.merging.targets import layer_of, select_targets
from selfdev.models.sources import Located
from selfdev.sandbox import Context

__all__ = ["TaskVectors", "merge_by_method", "merge_tensor", "read_task_vectors", "select_targets"]


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The selected tensors of a seed, and the task vectors of its experts, float32 on the CPU.

    Attributes:
        seed: the seed's tensor of each selected parameter.
        experts: their names, in the order in which `stacked` stacks them.
        vectors: expert minus seed, by parameter and then by expert, in the order of `experts`.
        layers: number of layers of the model, those included of which nothing is selected.
    """

    seed: dict[str, Tensor]
    experts: tuple[str, ...]
    vectors: dict[str, dict[str, Tensor]]
    layers: int = 1

    def stacked(self, parameter: str) -> Tensor:
        """The task vectors of one parameter, shape (experts, *parameter)."""
        return torch.stack([self.vectors[parameter][expert] for expert in self.experts])

    def context(self, parameter: str) -> Context:
        """What an algorithm that asks for its third argument is told of one parameter."""
        return Context(self.seed[parameter], parameter, layer_of(parameter), self.layers)


def read_task_vectors(seed: Path, experts: Mapping[str, Path | Located], targets: str) -> TaskVectors:
    """Read a seed's selected tensors and its experts' task vectors from their folders.

    All configs and headers are compared before the first tensor is read. Tensors that are not selected may
    differ: an expert with a longer vocabulary merges in its layers. The result takes 4 bytes for each
    selected entry, times the number of experts plus one.

    Args:
        seed: a model's folder, safetensors in one file or sharded.
        experts: the experts' folders by name, or where a LoRA adapter and its base lie.
        targets: as in `select_targets`.

    Raises:
        UserError: no expert; a folder that is incomplete or damaged; an expert of another architecture;
            nothing selected; weights that are quantised or not finite.
    """
    if not experts:
        raise UserError("there is no expert to merge; name at least one")
    original = Checkpoint("the seed", seed)
    relatives = {
        name: open_expert(name, found if isinstance(found, Located) else Located(found), seed, pickled=True)
        for name, found in experts.items()
    }
    chosen = select_targets(original.shapes, targets)
    for relative in relatives.values():
        check_architecture(relative, original)
        check_tensors(relative, original, chosen, targets)
        warn_of_computation(relative, original)

    base = original.read(chosen)
    vectors: dict[str, dict[str, Tensor]] = {parameter: {} for parameter in chosen}
    for name, relative in relatives.items():
        for parameter, tensor in base.items():
            relative.check_stored(parameter)
            vectors[parameter][name] = torch.empty_like(tensor)
            relative.task_vector(parameter, tensor, vectors[parameter][name])
            relative.release(parameter)
    return TaskVectors(base, tuple(experts), vectors, original.layers(original.shapes))


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
    method.check(len(vectors.experts), dict(parameters))
    return {
        name: merge_tensor(method, parameters, name, vectors.stacked(name), tensor)
        for name, tensor in vectors.seed.items()
    }


def merge_tensor(
    method: Method, parameters: Mapping[str, Any], name: str, task_vectors: Tensor, seed: Tensor
) -> Tensor:
    """Merge one parameter by a method of the library, as `merge_by_method` merges each.

    Args:
        method: of the library.
        parameters: of the method, by name; those left out take their default.
        name: of the parameter tensor.
        task_vectors: shape (experts, *parameter), float32.
        seed: the seed's tensor, shape (*parameter), float32.

    Returns:
        The merged task vector, shape (*parameter).
    """
    given = dict(parameters)
    drawn = next((each for each in method.parameters if each.name == "seed"), None)
    if drawn is not None:
        given["seed"] = _seed_of(parameters.get("seed", drawn.default), name)
    return method.merge(task_vectors, seed, **given)


def _seed_of(base: object, name: str) -> int:
    """A number in 0..2^31-1 that depends on both, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{base}/{name}".encode()).digest()[:4], "big") >> 1
