"""The zoos: seeds and experts that come with the project.

A zoo is a folder with one folder for the seed, called `seed`, one for each expert, and a CARD.md. Each model
folder is of transformers' format, tokenizer included.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from selfdev.errors import UserError
from selfdev.names import nearest

_SHIPPED = {name: Path(__file__).parent / f"{name}_models" for name in ("nano", "nano2")}


class ZooModels(TypedDict):
    """Where the models of a zoo lie."""

    seed: Path
    experts: dict[str, Path]


def zoos() -> list[str]:
    """The names of the zoos."""
    return sorted(_SHIPPED)


def zoo_path(name: str) -> Path:
    """The folder of a zoo.

    Raises:
        UserError: no zoo has that name.
    """
    if name not in _SHIPPED:
        raise UserError(f"unknown zoo '{name}'; {nearest(name, _SHIPPED)}")
    return _SHIPPED[name]


def zoo_models(name: str, folder: Path | None = None) -> ZooModels:
    """The seed and the experts of a zoo, experts in alphabetical order.

    Args:
        name: one of `zoos()`.
        folder: where it lies, if it was built anew; the one that came with the package by default.

    Raises:
        UserError: no zoo has that name, or there is no seed in the folder.
    """
    folder = folder or zoo_path(name)
    folders = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    if "seed" not in folders:
        raise UserError(f"'{folder}' holds no model 'seed'; `selfdev zoo build {name}` makes the zoo anew")
    return {"seed": folders.pop("seed"), "experts": folders}


def build(name: str, out: Path, progress: Callable[[str], None] = print) -> None:
    """Train a zoo anew into a folder that does not exist yet.

    Args:
        name: one of `zoos()`.
        out: where the folder shall be.
        progress: called with lines that say how far the work is.

    Raises:
        UserError: no zoo has that name, or `out` exists.
    """
    zoo_path(name)
    # Late, since training pulls in torch and transformers, which listing the zoos should not wait for.
    from selfdev.zoo.nano import RECIPES, build_nano

    build_nano(out, progress, RECIPES[name])
