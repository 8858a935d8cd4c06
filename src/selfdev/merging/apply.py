"""Writing a merged task vector into the model that is resident in memory, for as long as it is measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from selfdev.merging.task_vectors import TaskVectors

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def applied(
    model: Model, vectors: TaskVectors, merged: Mapping[str, Tensor], factor: float = 1.0
) -> Iterator[Model]:
    """Turn the seed into the merged model inside the `with` block, and back afterwards.

    The parameters are written in place; the rest of the model is not touched. Afterwards they hold the seed's
    tensors bit for bit, also if the block raises: casting the float32 copy of a stored tensor to the model's
    type gives what loading gave.

    Args:
        model: the seed, on any device and of any floating-point type.
        vectors: what was read from that same seed.
        merged: the merged task vector of each parameter that changes, of the parameter's shape.
        factor: what these are multiplied by.

    Yields:
        The model, with seed plus factor times merged task vector in these parameters.

    Raises:
        ValueError: a parameter that the task vectors or the model do not have, or a wrong shape; nothing is
            written then.
    """
    # Tied parameters stand under each of their names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in merged.items():
        if name not in vectors.seed or name not in parameters:
            raise ValueError(f"parameter '{name}' is not one of the seed's that were selected for merging")
        if not tensor.shape == vectors.seed[name].shape == parameters[name].shape:
            raise ValueError(
                f"the merged task vector of '{name}' has shape {tuple(tensor.shape)}, the seed's tensor "
                f"{tuple(vectors.seed[name].shape)} and the model's parameter {tuple(parameters[name].shape)}"
            )
    try:
        with torch.no_grad():
            for name, tensor in merged.items():
                # Added in float32 and rounded once.
                parameters[name].copy_(vectors.seed[name].to(tensor.device) + factor * tensor)
        yield model
    finally:
        with torch.no_grad():
            for name in merged:
                parameters[name].copy_(vectors.seed[name])
