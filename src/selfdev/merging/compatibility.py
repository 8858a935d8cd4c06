"""What must hold between a seed and its experts before anything is merged. All of it is read from headers."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from selfdev.errors import UserError
from selfdev.merging.targets import selects

# What makes two models the same architecture, beside the shapes of what is merged. The vocabulary's size is
# not in it: experts often add a token or two, and their layers merge nevertheless.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

# What a model computes with its weights, beside their shapes.
_COMPUTATION = (
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_type",
    "sliding_window",
    "num_experts_per_tok",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
)

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of weights that can be merged. F8 is not among them: what 8 bits keep needs a scale that lies elsewhere."""

_WAY_OUT = "experts must share the seed's architecture: choose a fine-tuned relative of the seed"


_log = logging.getLogger(__name__)


class Model(Protocol):
    """What is compared of a model."""

    owner: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]


def check_quantised(model: Model) -> None:
    """Raise UserError if a model's config says that its weights are quantised."""
    quantised = model.config.get("quantization_config")
    if quantised:
        by = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"{model.owner}: its config says that its weights are quantised{f' by {by}' if by else ''}, and task "
            "vectors need floating-point weights; give the unquantised model, or save a dequantised one"
        )


def check_distinct(seed: str, experts: Mapping[str, str]) -> None:
    """Raise UserError if an expert has nothing to teach: the seed's weights, or those of another one.

    Args:
        seed: hash of the seed's weights.
        experts: hash of each expert's, by its name.
    """
    first: dict[str, str] = {}
    for name, weights in experts.items():
        if weights == seed:
            raise UserError(
                f"expert '{name}' has the seed's weights, so there is nothing to merge; choose another"
            )
        if first.setdefault(weights, name) != name:
            raise UserError(
                f"experts '{first[weights]}' and '{name}' have the same weights; give one of them"
            )


def check_architecture(expert: Model, seed: Model) -> None:
    """Raise UserError if an expert's config names another architecture than the seed's."""
    for theirs, ours in ((expert.config, seed.config), (_text_model(expert), _text_model(seed))):
        for field in _ARCHITECTURE:
            one, other = theirs.get(field), ours.get(field)
            # Configs written by older versions leave out fields that have a default; the shapes tell then.
            if one != other and (field == "model_type" or None not in (one, other)):
                raise UserError(
                    f"{expert.owner}: its config says {field} {one} and the seed's says {other}; {_WAY_OUT}"
                )


def warn_of_computation(expert: Model, seed: Model) -> None:
    """Say where an expert's config computes otherwise than the seed's, which the merged model has."""
    theirs, ours = _computation(expert), _computation(seed)
    differ = [field for field in theirs.keys() & ours.keys() if theirs[field] != ours[field]]
    if differ:
        _log.warning(
            "%s: its config says %s; the merged model computes as the seed's says",
            expert.owner,
            " and ".join(f"{field} {theirs[field]} (the seed's {ours[field]})" for field in sorted(differ)),
        )


def _text_model(model: Model) -> Mapping[str, Any]:
    """The config of its language model; that of the whole where it is nothing else."""
    config = model.config.get("text_config")
    return config if isinstance(config, dict) else model.config


def _computation(model: Model) -> dict[str, Any]:
    """What of `_COMPUTATION` a config says; older ones have in the open what newer ones put into `rope_parameters`."""
    config = _text_model(model)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := config.get(name), dict):
            config = {**config, **rope}
    return {field: config[field] for field in _COMPUTATION if config.get(field) is not None}


def check_tensors(
    expert: Model,
    seed: Model,
    chosen: Sequence[str],
    targets: str,
    *,
    rows: Collection[str] = (),
    ignored: Sequence[str] = (),
) -> None:
    """Raise UserError unless the chosen tensors are in both, floating-point, and of one shape.

    Args:
        expert: one of them.
        seed: the seed.
        chosen: what is merged.
        targets: what chose them; an expert's tensor that it selects and the seed lacks is an error too.
        rows: those of the chosen ones that may have other numbers of rows.
        ignored: tensors that the expert may have beyond the seed's.
    """
    for name in chosen:
        if name not in expert.shapes:
            raise UserError(
                f"{expert.owner}: it has no tensor '{name}' and the seed has one of shape "
                f"{seed.shapes[name]}; {_way_out(name, seed, expert)}"
            )
        first = 1 if name in rows else 0
        if expert.shapes[name][first:] != seed.shapes[name][first:]:
            raise UserError(
                f"{expert.owner}: its '{name}' has shape {expert.shapes[name]} and the seed's has "
                f"{seed.shapes[name]}; {_WAY_OUT}, or leave this tensor out of the targets"
            )
        for each in (seed, expert):
            if each.types[name] not in FLOATING:
                raise UserError(
                    f"{each.owner}: its '{name}' is stored as {each.types[name]}, and task vectors need "
                    f"unquantised weights ({', '.join(sorted(FLOATING))}); give the unquantised model, or targets "
                    "without this tensor"
                )
    for name in sorted(set(expert.shapes) - set(seed.shapes) - set(ignored)):
        if selects(targets, name, expert.shapes[name]):
            raise UserError(
                f"{expert.owner}: it has a tensor '{name}' of shape {expert.shapes[name]} and the seed has "
                f"none; {_WAY_OUT}, or targets without this tensor"
            )


def _way_out(missing: str, seed: Model, expert: Model) -> str:
    """Where an expert lacks a tensor of the seed's: it may have it by another name."""
    for name in expert.shapes:
        if name.endswith(f".{missing}") or missing.endswith(f".{name}"):
            longer, shorter = (expert, seed) if len(name) > len(missing) else (seed, expert)
            odd = longer if "_orig_mod." in name + missing else shorter
            return (
                f"it has '{name}', so the names of one of the two begin otherwise, as those of a model that was saved "
                f"without its head, or compiled: load {odd.owner} by AutoModelForCausalLM and save it anew with "
                "save_pretrained"
            )
    if ".experts." in missing and any(".experts." in name for name in expert.shapes):
        return (
            "one of the two stores a mixture's experts one by one, the other packed into one tensor, as mergekit "
            "writes them; give both in the form in which the model was published"
        )
    return f"{_WAY_OUT}, or targets without this tensor"
