"""A merge whose models have been found to fit: what is read, what is merged, and how each tensor will be written."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from selfdev.errors import UserError
from selfdev.merging.compatibility import (
    FLOATING,
    check_architecture,
    check_quantised,
    check_tensors,
    warn_of_computation,
)
from selfdev.merging.reader import Checkpoint, open_expert
from selfdev.merging.recipe import Recipe
from selfdev.merging.targets import select_targets
from selfdev.merging.vocabulary import check_same_tokens, settle
from selfdev.merging.writer import Planned
from selfdev.models.sources import locate, resolve
from selfdev.models.weights import TYPES

_STORED = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_ROOM_BESIDE = 64 << 20

_PASSING = 4 << 30
"""Bytes of all models from which on none of them stays in the system's cache."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A merge whose models have been found to fit.

    Attributes:
        seed: the seed.
        seed_source: as the user gave it.
        experts: by name.
        sources: of the experts, as the user gave them.
        chosen: names of the tensors that are merged.
        rows: of those among them that are merged in part, how many first rows.
        order: names of all tensors that are written, as they lie in the seed's files.
        targets: what chose the tensors.
        dtype: as in `Recipe`.
        tokenizer: the folder that the tokenizer is taken from.
    """

    seed: Checkpoint
    seed_source: str
    experts: Mapping[str, Checkpoint]
    sources: Mapping[str, str]
    chosen: frozenset[str]
    rows: Mapping[str, int]
    order: Sequence[str]
    targets: str
    dtype: str | None
    tokenizer: Path

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return self.seed.layers(self.order)

    @property
    def counts(self) -> tuple[int, int]:
        """How many tensors are merged, and how many there are."""
        return len(self.chosen), len(self.order)

    @cached_property
    def passing(self) -> bool:
        """Whether the models pass through the system's cache and do not stay there.

        They would put out what others have there, and to fill new pages can take longer than to merge what is in them.
        """
        files = {file for model in (self.seed, *self.experts.values()) for file in model.files}
        return sum(file.stat().st_size for file in files) > _PASSING

    @property
    def largest(self) -> int:
        """Entries of the largest tensor that is merged."""
        return max((math.prod(self.seed.shapes[name]) for name in self.chosen), default=0)

    def planned(self, name: str) -> Planned:
        """How a tensor will be written."""
        stored, shape, entry = self.seed.types[name], self.seed.shapes[name], self.seed.entry(name)
        if self.dtype is not None and stored in FLOATING:
            return Planned.of(name, _STORED[self.dtype], shape)
        if stored in TYPES:
            return Planned.of(name, stored, shape)
        return Planned(name, stored, shape, entry.end - entry.begin)

    def check_room(self, out: Path) -> None:
        """Raise UserError if the disk is known to be too full."""
        needed = sum(self.planned(name).size for name in self.order) + _ROOM_BESIDE
        free = shutil.disk_usage(existing_folder(out)).free
        if free < needed:
            raise UserError(
                f"'{out}': the merged model takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; make room, "
                "choose another --out, or a smaller --dtype"
            )


def prepare(recipe: Recipe, targets: str) -> Job:
    """Find the models and check that they fit, from configs and headers alone."""
    folder = resolve(recipe.seed, pickled=True)
    seed = Checkpoint("the seed", folder, pickled=True)
    check_quantised(seed)
    experts = {
        name: open_expert(name, locate(source, recipe.seed, pickled=True), folder, pickled=True)
        for name, source in recipe.experts.items()
    }
    order = seed.order()
    chosen = select_targets({name: seed.shapes[name] for name in order}, targets)
    for expert in experts.values():
        check_quantised(expert)
        check_architecture(expert, seed)
    tokenizer = _tokenizer(recipe, seed, experts)
    settled = settle(seed, list(experts.values()), chosen, recipe.embeddings)
    if not settled.chosen:
        raise UserError(
            f"targets '{targets}': all that they select is kept as the seed has it, for embeddings and output head are "
            "tied, or --embeddings seed says so; nothing would be merged. Choose other targets"
        )
    for expert in experts.values():
        ignored = settled.ignored
        if recipe.schedule is not None:  # as mergekit does
            ignored = ignored + _left_out(expert, seed, ignored)
        check_tensors(expert, seed, settled.chosen, targets, rows=settled.rows, ignored=ignored)
        warn_of_computation(expert, seed)
    return Job(
        seed=seed,
        seed_source=recipe.seed,
        experts=experts,
        sources=recipe.experts,
        chosen=frozenset(settled.chosen),
        rows=settled.rows,
        order=[name for name in order if name != settled.dropped],
        targets=targets,
        dtype=recipe.dtype,
        tokenizer=tokenizer,
    )


def _left_out(expert: Checkpoint, seed: Checkpoint, ignored: Sequence[str]) -> list[str]:
    """The tensors that an expert has beyond the seed's, said to be left out, but for those that are ignored anyway."""
    extra = sorted(expert.shapes.keys() - seed.shapes.keys() - set(ignored))
    if extra:
        _log.warning(
            "%s: '%s' is left out, since the seed has none such (%s in all)",
            expert.owner,
            extra[0],
            len(extra),
        )
    return extra


def _tokenizer(recipe: Recipe, seed: Checkpoint, experts: Mapping[str, Checkpoint]) -> Path:
    """The folder of the model whose tokenizer is written."""
    if recipe.tokenizer is None or recipe.tokenizer == recipe.seed:
        return seed.folder
    if recipe.tokenizer == "union":
        for expert in experts.values():
            check_same_tokens(expert.owner, expert.folder, seed)
        return seed.folder
    theirs = experts.get(recipe.tokenizer)
    folder = resolve(recipe.tokenizer, pickled=True) if theirs is None else theirs.folder
    check_same_tokens(f"the tokenizer of '{recipe.tokenizer}'", folder, seed)
    return folder


def existing_folder(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
