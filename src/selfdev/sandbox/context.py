"""The third argument that an algorithm may ask for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Context:
    """What is known of the parameter tensor that is being merged.

    Attributes:
        seed: the seed model's own tensor, float32, of the task vectors' shape.
        name: of the parameter, as in the checkpoint.
        layer: index of its layer, from 0; -1 where it belongs to none.
        layers: number of layers of the model.
    """

    seed: torch.Tensor
    name: str = ""
    layer: int = 0
    layers: int = 1
