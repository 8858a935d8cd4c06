"""Where a model computes."""

import torch

from selfdev.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """The device of this name; for `auto` a GPU of CUDA's if there is one, and the CPU otherwise.

    Args:
        wanted: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UserError: this machine, or this build of torch, has none.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there[wanted]:
        raise UserError(
            f"factory.device: {wanted}, and torch finds none on this machine; install a build of torch for it, or set "
            "factory.device to auto"
        )
    return torch.device(wanted)
