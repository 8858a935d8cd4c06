"""Where a model computes."""

from dataclasses import dataclass

import torch

from selfdev.errors import UserError


@dataclass(frozen=True)
class Place:
    """A device, and the type of the weights on it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str, asked_by: str) -> "Place":
        """The device of a name, see `pick_device`, and the type of one, such as `bfloat16`."""
        return cls(pick_device(device, asked_by), getattr(torch, dtype))

    def __str__(self) -> str:
        return f"{self.device.type} {str(self.dtype).removeprefix('torch.')}"


ON_CPU = Place(torch.device("cpu"), torch.float32)


def pick_device(wanted: str, asked_by: str) -> torch.device:
    """The device of this name; for `auto` a GPU of CUDA's if there is one, and the CPU otherwise.

    Args:
        wanted: `auto`, `cpu`, `cuda` or `mps`.
        asked_by: the setting or option that says so, for the message.

    Raises:
        UserError: this machine, or this build of torch, has none.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there[wanted]:
        raise UserError(
            f"{asked_by}: {wanted}, and torch finds none on this machine; install a build of torch for it, or set "
            f"{asked_by} to auto"
        )
    return torch.device(wanted)
