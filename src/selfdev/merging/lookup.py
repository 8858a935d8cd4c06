"""From the word behind `--method` to an algorithm: a name of the library, a file, or a candidate of a run."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from selfdev.algorithms.library import method as library_method
from selfdev.algorithms.library import methods
from selfdev.algorithms.source import ENTRY
from selfdev.archive import ARCHIVE
from selfdev.errors import UserError
from selfdev.merging.algorithm import (
    Algorithm,
    Found,
    JailedProgram,
    LibraryMethod,
    Origin,
    TrustedFile,
    jail,
)
from selfdev.merging.recipe import Recipe
from selfdev.sandbox import Limits
from selfdev.streams import stream_seed

_TARGETS = "mlp"  # as in the contract
_LARGEST_SEED = 2**63 - 1


def find(recipe: Recipe) -> Found:
    """Find what a recipe's method names.

    Raises:
        UserError: nothing of the kind exists, or it does not take the recipe's parameters.
    """
    word, parameters = recipe.method, recipe.parameters
    run, colon, candidate = word.rpartition(":")
    if word in methods():
        _refuse_trust(recipe)
        return _library(recipe)
    if word.endswith(".py"):
        return _file(Path(os.path.expanduser(word)), parameters, trust=recipe.trust)
    if colon and run:
        _refuse_trust(recipe)
        # Late, since configs and archives take a while to import.
        from selfdev.merging.discovered import find_candidate

        return find_candidate(Path(os.path.expanduser(run)), candidate, parameters)
    if word.endswith((".yml", ".yaml")):
        raise UserError(f"method '{word}' is a YAML file; give a configuration of mergekit's with --config")
    if os.path.isfile(os.path.join(os.path.expanduser(word), ARCHIVE)):
        raise UserError(f"method '{word}' is a run; name one of its programs, as in {word}:learning/1/001")
    library_method(word)  # which says what is known
    raise AssertionError(word)


def check_schedule(recipe: Recipe, names: Collection[str], layers: int) -> None:
    """Try a recipe's schedule on tensors of one entry, so that a mistake in it ends the merge before it begins.

    Args:
        recipe: what to merge, and how.
        names: of the tensors that will be merged.
        layers: of the model.

    Raises:
        UserError: the method does not take what the schedule gives.
    """
    if recipe.schedule is None:
        return
    recipe.schedule.check(names, layers)
    method, vectors = library_method(recipe.method), torch.ones(len(recipe.experts), 1)
    for name in names:
        parameters = recipe.schedule.parameters(name, layers)
        try:
            method.merge(vectors, vectors[0], **parameters)
        except UserError as error:
            raise UserError(f"{recipe.schedule.file}: for tensor '{name}', {error}") from None


def _refuse_trust(recipe: Recipe) -> None:
    if recipe.trust:
        raise UserError(
            f"--trust is for a file of your own, and '{recipe.method}' is none; methods of the library need no trust, "
            "and what a model wrote runs in the jail"
        )


def _library(recipe: Recipe) -> Found:
    method, schedule = library_method(recipe.method), recipe.schedule
    method.check(len(recipe.experts), dict(recipe.parameters))

    def parameters_of(name: str, layers: int) -> Mapping[str, Any]:
        return recipe.parameters if schedule is None else schedule.parameters(name, layers)

    @contextmanager
    def opened(_: int, __: int) -> Iterator[Algorithm]:
        yield LibraryMethod(method, parameters_of)

    return Found(_TARGETS, opened)


def _file(path: Path, parameters: Mapping[str, Any], *, trust: bool) -> Found:
    try:
        source = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"method '{path}' cannot be read: {error}; give a Python file that is there"
        ) from None
    if ENTRY not in source:
        raise UserError(f"'{path}' defines no {ENTRY}(model_dict, device); see docs/algorithms.md")
    drawn = parameters.get("seed", 0)
    if set(parameters) - {"seed"} or not isinstance(drawn, int) or not 0 <= drawn <= _LARGEST_SEED:
        raise UserError(
            f"'{path}': a file takes no parameters but -p seed=N, the seed of its random numbers in 0..2^63-1; write "
            "constants into the file"
        )

    def seed_of(name: str) -> int:
        return stream_seed(drawn, "merge", name)

    @contextmanager
    def opened(experts: int, largest: int) -> Iterator[Algorithm]:
        if trust:
            yield TrustedFile(path, seed_of)
            return
        hint = " If the file is your own, --trust runs it without the jail."
        with jail(Limits(), experts, largest, hint) as box:
            origin = Origin(f"`{path.name}`, run in the jail", source)
            way_out = "mend it, or, if it is your own, run it without the jail by --trust"
            yield JailedProgram(origin, box, seed_of, way_out=way_out)

    return Found(_TARGETS, opened)
