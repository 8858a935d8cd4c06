"""Merges as mergekit (0.1.5) describes them in YAML, read as recipes.

Taken are the methods of `mergekit_methods`, `models` or `slices` that leave every layer in its place, parameters with
gradients and filters, `dtype`, `out_dtype` and a tokenizer that all models share. Everything else is refused by its
key and line: nothing of a file is passed over but what mergekit passes over too.

What comes out is what mergekit gives in float32. It computes in the file's `dtype`; here sums are float32 and rounded
once, to `out_dtype`, or `dtype` if there is none, or else to what the base model stores. Mixtures of experts are taken
where no more than single entries decide, since mergekit packs their experts into one tensor first.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfdev.algorithms.library import method
from selfdev.algorithms.library.specification import unknown_name
from selfdev.errors import UserError
from selfdev.merging.mergekit_methods import PARAMETERS, REQUIRED, TRANSLATIONS, WITHOUT_BASE, Translation
from selfdev.merging.mergekit_settings import Lines, Setting, Value, read_setting, read_yaml
from selfdev.merging.recipe import TORCH_DTYPES, Recipe
from selfdev.merging.targets import layer_of, stack_of

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
_NOT_TAKEN = {
    "modules": "merges parts of a model by themselves, which is not done here; write models, and leave parts out "
    "with `selfdev merge --targets`",
    "chat_template": "is not taken; merge without it and write chat_template.jinja into the merged folder",
    "residual_weight": "is not taken; leave it out",
    "allow_crimes": "is not taken: models of other architectures cannot be merged; leave it out",
}

_MAKE_ONE = (
    "`selfdev merge --method linear --targets all --seed BASE --expert lora=ADAPTER --out DIR` makes one"
)

# What mergekit counts to the first slice: embeddings of tokens and positions, and their norms.
_BEFORE_LAYERS = re.compile(r"emb(?!ed_out)|(^|\.)w[tp]e\.")

# A mixture's experts as most are published: a tensor each.
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")

_Settings = Mapping[str, Setting]

_log = logging.getLogger(__name__)


def read_config(file: Path, embeddings: str | None = None) -> Recipe:
    """Read a mergekit configuration.

    Args:
        file: in YAML.
        embeddings: as in `Recipe`.

    Raises:
        UserError: it cannot be read, or asks for something that is not taken; the message names key and line.
    """
    config = read_yaml(file)
    _check_keys(config, _KEYS, "a merge")
    if "merge_method" not in config:
        raise UserError(f"{file} has no merge_method; name one of {', '.join(TRANSLATIONS)}")
    method = str(config["merge_method"])
    if method == "passthrough":
        config.refuse(
            "merge_method", "is not taken: layers that change their place are not merged; use mergekit"
        )
    if method not in TRANSLATIONS:
        config.refuse("merge_method", f"is not taken: {unknown_name('method', method, list(TRANSLATIONS))}")
    base = _model(config, "base_model") if config.get("base_model") is not None else None
    translation = WITHOUT_BASE.get(method, TRANSLATIONS[method]) if base is None else TRANSLATIONS[method]
    shared = _settings(config, translation)
    sections = _sections(config, translation)
    models = sections[0].models
    for section in sections[1:]:
        if section.models != models:
            config.refuse(
                "slices", "take layers from different models; give every slice the same ones in one order"
            )
    seed, experts = _roles(config, translation, base, models)
    return Recipe(
        method=translation.ours,
        seed=seed,
        experts=_named(experts),
        targets="all",
        dtype=_dtype(config),
        embeddings=embeddings,
        tokenizer=_tokenizer(config),
        schedule=_Plan(file, file.read_text(), translation, tuple(sections), shared, tuple(experts)),
    )


@dataclass(frozen=True)
class _Section:
    """Layers that stay in their place.

    Attributes:
        models: their sources.
        layers: first one, and the one behind the last; None for all.
        each: parameters of each model.
        shared: parameters of the slice.
    """

    models: tuple[str, ...]
    layers: tuple[int, int] | None
    each: tuple[_Settings, ...]
    shared: _Settings = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """The parameters of each tensor, by a configuration."""

    file: Path
    text: str
    translation: Translation
    sections: tuple[_Section, ...]
    shared: _Settings
    experts: tuple[str, ...]

    def check(self, names: Collection[str], layers: int) -> None:
        ends = [section.layers or (0, layers) for section in self.sections]
        begins = [0, *(end for _, end in ends)]
        if [begin for begin, _ in ends] != begins[:-1] or begins[-1] != layers:
            raise UserError(
                f"{self.file}: its slices do not hold the {layers} layers of the base model one after the other; only "
                "slices that leave every layer in its place are merged. Give the whole range, or merge with mergekit"
            )
        if len(self.sections) > 1 or self._has_gradients():
            self._check_stack(names, layers)
        filters = {wanted for setting in self._settings() for wanted in setting.filters}
        for wanted in sorted(filters):
            if not any(wanted in name for name in names):
                _log.warning("%s: no tensor's name contains the filter '%s'", self.file, wanted)
        mixed = next((name for name in sorted(names) if _ONE_EXPERT.search(name)), None)
        if mixed is not None and (filters or not method(self.translation.ours).entrywise):
            raise UserError(
                f"{self.file}: '{mixed}' is one expert of a mixture. mergekit packs them into one tensor first, over "
                "which filters, thresholds and angles go; that is not done here. Merge with mergekit, or by "
                "`selfdev merge --method`, which takes each tensor as it is stored"
            )

    def _check_stack(self, names: Collection[str], layers: int) -> None:
        """Raise UserError for layers that gradients and slices are not about, such as a vision tower's."""
        stacked = [(stack, layer_of(name), name) for name in names if (stack := stack_of(name)) is not None]
        last = {stack for stack, layer, _ in stacked if layer == layers - 1}
        tensors = Counter(stack for stack, _, _ in stacked)
        ours = max(tensors, key=lambda stack: (stack in last, tensors[stack]), default="")
        for stack, layer, name in stacked:
            if stack != ours or layer >= layers:
                raise UserError(
                    f"{self.file}: its gradients or slices are over the {layers} layers '{ours}', and '{name}' is in "
                    "none of these; give the same values for all layers, or merge with mergekit"
                )

    def _settings(self) -> list[Setting]:
        groups = [
            self.shared,
            *(group for section in self.sections for group in (section.shared, *section.each)),
        ]
        return [setting for group in groups for setting in group.values()]

    def _has_gradients(self) -> bool:
        return any(setting.differs_by_depth for setting in self._settings())

    def parameters(self, name: str, layers: int) -> dict[str, Any]:
        layer = layer_of(name)
        section = self._section(name, layer)
        begin, end = section.layers or (0, layers)
        # Embeddings, head and norms have no depth: mergekit gives them a gradient's first value.
        depth = 0.0 if layer < 0 else (layer - begin) / (end - begin - 1) if end - begin > 1 else 1.0
        wide = (section.shared, self.shared)
        shared = {
            key: self._value(key, wide, name, depth, default)
            for key, default in self.translation.shared.items()
        }
        each = {
            key: [
                self._value(key, (section.each[section.models.index(expert)], *wide), name, depth, default)
                if expert in section.models
                else self._value(key, wide, name, depth, default)
                for expert in self.experts
            ]
            for key, default in self.translation.per_model.items()
        }
        try:
            return self.translation.translate(each, shared)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None

    def _section(self, name: str, layer: int) -> _Section:
        if layer < 0:
            return self.sections[0 if _BEFORE_LAYERS.search(name) else -1]
        return next(each for each in self.sections if each.layers is None or layer < each.layers[1])

    def _value(
        self, key: str, settings: Sequence[_Settings], name: str, depth: float, default: Value | None
    ) -> Value:
        """The first of the settings, from the narrowest to the widest, that has a value for the tensor."""
        for setting in settings:
            if key in setting and (value := setting[key].at(name, depth)) is not None:
                return value
        if default is REQUIRED:
            raise UserError(
                f"{self.file}: no '{key}' is given for tensor '{name}'; add a value without a filter to every model's "
                "parameters, or to those of the merge"
            )
        return default


def _check_keys(given: Lines, known: Sequence[str], where: str) -> None:
    for key in given:
        if key in _NOT_TAKEN:
            given.refuse(key, _NOT_TAKEN[key])
    given.check_keys([*known, *(["tokenizer"] if "tokenizer_source" in known else [])], where)


def _settings(owner: Lines, translation: Translation) -> _Settings:
    """The parameters of a merge, a slice or a model that the method reads."""
    given = owner.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, Lines):
        owner.refuse("parameters", "holds no mapping; give names and values")
    kinds = {**translation.per_model, **translation.shared}
    for key in given:
        if key not in PARAMETERS:
            given.refuse(key, f"is not taken: {unknown_name('parameter', key, PARAMETERS)}")
    return {
        key: read_setting(given, key, bool if isinstance(kinds[key], bool) else float)
        for key in given
        if key in kinds
    }


def _sections(config: Lines, translation: Translation) -> list[_Section]:
    if ("models" in config) == ("slices" in config):
        raise UserError(f"{config.file} needs models or slices, one of the two; name the models to merge")
    if "models" in config:
        entries = _mappings(config, "models")
        for entry in entries:
            _check_keys(entry, ("model", "parameters"), "a model")
        each = tuple(_settings(entry, translation) for entry in entries)
        return [_Section(_distinct(config, entries), None, each)]
    return [_slice(piece, translation) for piece in _mappings(config, "slices")]


def _slice(piece: Lines, translation: Translation) -> _Section:
    _check_keys(piece, ("sources", "parameters"), "a slice")
    entries = _mappings(piece, "sources")
    for entry in entries:
        _check_keys(entry, ("model", "layer_range", "parameters"), "a source")
        bounds = entry.get("layer_range")
        if not (isinstance(bounds, list) and [type(bound) for bound in bounds] == [int, int]):
            entry.refuse("layer_range", "is no pair of numbers; write for instance layer_range: [0, 32]")
        if bounds != entries[0]["layer_range"]:
            entry.refuse(
                "layer_range",
                "differs from that of the first source; only layers of one place are merged here",
            )
    first, last = entries[0]["layer_range"]
    each = tuple(_settings(entry, translation) for entry in entries)
    return _Section(_distinct(piece, entries), (first, last), each, _settings(piece, translation))


def _mappings(owner: Lines, key: str) -> list[Lines]:
    if key not in owner:
        owner.refuse(key, "is missing; name the models to merge")
    entries = owner[key]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Lines) for entry in entries):
        owner.refuse(key, "is no list of mappings; write each entry as `- model: ...`")
    return entries


def _distinct(owner: Lines, entries: Sequence[Lines]) -> tuple[str, ...]:
    for entry in entries:
        if "model" not in entry:
            entry.refuse("model", "is missing; name one")
    models = tuple(_model(entry, "model") for entry in entries)
    for index, entry in enumerate(entries):
        if models[index] in models[:index]:
            entry.refuse("model", f"names '{entry['model']}' a second time; give each model once")
    return models


def _model(owner: Lines, key: str) -> str:
    """A model's source in our words: mergekit writes an adapter behind its base."""
    given = owner[key]
    if not isinstance(given, str):
        owner.refuse(key, "is no text; write MODEL, MODEL@REVISION or MODEL+ADAPTER")
    base, _, adapter = given.partition("+")
    return f"{adapter}+{base}" if adapter else base


def _roles(
    config: Lines, translation: Translation, base: str | None, models: Sequence[str]
) -> tuple[str, list[str]]:
    """The seed, and the experts in their order."""
    method = config["merge_method"]
    others = [model for model in models if model != base]
    if translation.others is not None and len(others) != translation.others:
        raise UserError(
            f"{config.file}: {method} merges {translation.others} model(s) beside the base model, and {len(others)} "
            "are named; choose the models anew"
        )
    sliced = "slices" in config
    if base is not None and "+" in base:
        config.refuse(
            "base_model",
            "is an adapter on its base, and the others are merged into a whole model; " + _MAKE_ONE,
        )
    if translation.base == "input":
        seed = base or next((model for model in models if "+" not in model), None)
        if seed is None:
            raise UserError(f"{config.file} names adapters alone, and one whole model is needed; {_MAKE_ONE}")
        # To the sources of slices mergekit adds no base model.
        return seed, [*models, *([base] if base and base not in models and not sliced else [])]
    if base is None:
        raise UserError(
            f"{config.file} names no base_model, and {method} is merged from one here; add base_model, the model that "
            "the others were trained from"
        )
    return base, [base, *others] if translation.base == "first" else others


def _named(models: Sequence[str]) -> dict[str, str]:
    """Names for experts, made of the last parts of their sources."""
    named: dict[str, str] = {}
    for model in models:
        stem = re.sub(r"[^\w.-]+", "-", model.partition("+")[0].rstrip("/").rpartition("/")[2]).strip("-.")
        name, number = stem or "model", 2
        while name in named:
            name, number = f"{stem or 'model'}-{number}", number + 1
        named[name] = model
    return named


def _dtype(config: Lines) -> str | None:
    given = {key: str(config[key]) for key in ("out_dtype", "dtype") if config.get(key) is not None}
    for key, name in given.items():
        if name.removeprefix("torch.") not in TORCH_DTYPES:
            config.refuse(key, f"is {name}; weights are written as {', '.join(TORCH_DTYPES)}")
    return next((TORCH_DTYPES[name.removeprefix("torch.")] for name in given.values()), None)


def _tokenizer(config: Lines) -> str | None:
    """Whose tokenizer is wanted: a model's, or all of them (`union`); None for the seed's."""
    owner, key = config, "tokenizer_source"
    if config.get("tokenizer") is not None:
        owner, key = config["tokenizer"], "source"
        if not isinstance(owner, Lines):
            config.refuse("tokenizer", "is no mapping; write tokenizer_source: base, union or a model")
        for name in owner:
            if name != "source" and owner[name]:
                owner.refuse(
                    name, "changes rows of the embeddings, which is not done here; merge with mergekit"
                )
        if "tokenizer_source" in config:
            config.refuse("tokenizer_source", "stands beside 'tokenizer'; give one of the two")
    given = owner.get(key, "union" if owner is not config else None)
    if given is None or given == "base":
        return None
    return given if given == "union" else _model(owner, key)
