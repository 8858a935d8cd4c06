"""mergekit's methods (version 0.1.5) in terms of the library's: names, parameters, and the role of the base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfdev.algorithms.library.specification import MERGEKIT
from selfdev.errors import UserError

REQUIRED = None
"""Stands for the default of a parameter that has none."""

PerModel = Mapping[str, Sequence[float]]
Shared = Mapping[str, Any]

_IGNORED = "int8_mask"
"""A parameter that changes what mergekit's masks take of memory, and not the result."""


@dataclass(frozen=True)
class Translation:
    """One of mergekit's methods.

    Attributes:
        ours: name in the library.
        translate: from its parameters, those of each model as a list in the order of the experts, to ours.
        per_model: parameters of each model with their defaults.
        shared: parameters of the whole merge with their defaults.
        base: `origin`: experts are measured from the base model; `first`: it is the first of the experts; `input`:
            there need be none, and if there is it is an expert like the others.
        others: so many models beside the base; None if any number will do.
    """

    ours: str
    translate: Callable[[PerModel, Shared], dict[str, Any]]
    per_model: Mapping[str, float | None] = field(default_factory=dict)
    shared: Mapping[str, float | bool | None] = field(default_factory=dict)
    base: str = "origin"
    others: int | None = None


def _task_arithmetic(each: PerModel, shared: Shared) -> dict[str, Any]:
    weights, total = each["weight"], sum(each["weight"])
    divisor = total if shared["normalize"] and abs(total) >= 1e-8 else 1.0
    return {"weights": [shared["lambda"] * weight / divisor for weight in weights]}


def _thinning(**constant: Any) -> Callable[[PerModel, Shared], dict[str, Any]]:
    """For the methods that drop entries; `constant` are parameters of ours that stand for mergekit's method."""
    names = {"weight": "weights", "gamma": "outliers"}

    def translate(each: PerModel, shared: Shared) -> dict[str, Any]:
        lists = {names.get(name, name): list(values) for name, values in each.items()}
        flags = {name: shared[name] for name in ("normalize", "rescale")}
        return {**lists, **flags, "scale": shared["lambda"], "reading": MERGEKIT, **constant}

    return translate


def _nuslerp(each: PerModel, shared: Shared) -> dict[str, Any]:
    directions = {"flatten": shared["nuslerp_flatten"], "row_wise": shared["nuslerp_row_wise"]}
    return {"t": _way(each["weight"]), **directions, "reading": MERGEKIT}


def _nuslerp_of_weights(each: PerModel, shared: Shared) -> dict[str, Any]:
    if not shared["nuslerp_flatten"]:
        raise UserError(
            "nuslerp_flatten: false is taken with a base_model alone; name one, and task vectors are merged in the "
            "place of weights, or leave it out"
        )
    return {"t": _way(each["weight"])}


def _multislerp(origin: str) -> Callable[[PerModel, Shared], dict[str, Any]]:
    def translate(each: PerModel, shared: Shared) -> dict[str, Any]:
        flags = {"normalize": shared["normalize_weights"], "origin": origin, "reading": MERGEKIT}
        return {"weights": list(each["weight"]), **flags}

    return translate


def _way(weights: Sequence[float]) -> float:
    first, second = weights
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def _thinned(
    ours: str, *, normalize: bool, rescale: bool, more: Mapping[str, float] | None = None, **constant: Any
) -> Translation:
    return Translation(
        ours,
        _thinning(**constant),
        {"weight": REQUIRED, "density": 1.0, **(more or {})},
        {"normalize": normalize, "rescale": rescale, "lambda": 1.0},
    )


TRANSLATIONS: Mapping[str, Translation] = {
    "linear": Translation(
        "linear",
        lambda each, shared: {"weights": list(each["weight"]), "normalize": shared["normalize"]},
        {"weight": REQUIRED},
        {"normalize": True},
        base="input",
    ),
    "task_arithmetic": Translation(
        "weighted_task_arithmetic",
        _task_arithmetic,
        {"weight": REQUIRED},
        {"normalize": False, "lambda": 1.0},
    ),
    "ties": _thinned("ties", normalize=True, rescale=False),
    "dare_linear": _thinned("dare_linear", normalize=False, rescale=True),
    "dare_ties": _thinned("dare_ties", normalize=False, rescale=True),
    "della": _thinned("della", normalize=True, rescale=True, more={"epsilon": 0.15}),
    "della_linear": _thinned("della", normalize=False, rescale=True, more={"epsilon": 0.15}, elect=False),
    "breadcrumbs": _thinned("breadcrumbs", normalize=False, rescale=False, more={"gamma": 0.01}),
    "breadcrumbs_ties": _thinned(
        "breadcrumbs", normalize=False, rescale=False, more={"gamma": 0.01}, elect=True
    ),
    "model_stock": Translation(
        "model_stock",
        lambda _, shared: {"filter_wise": shared["filter_wise"], "reading": MERGEKIT},
        shared={"filter_wise": False},
    ),
    "slerp": Translation(
        "slerp",
        lambda _, shared: {"t": shared["t"], "reading": MERGEKIT},
        shared={"t": REQUIRED},
        base="first",
        others=1,
    ),
    "nuslerp": Translation(
        "nuslerp",
        _nuslerp,
        {"weight": REQUIRED},
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        others=2,
    ),
    "multislerp": Translation(
        "multislerp",
        _multislerp("seed"),
        {"weight": REQUIRED},
        {"normalize_weights": True},
    ),
    "karcher": Translation(
        "karcher",
        lambda _, shared: {
            "steps": int(shared["max_iter"]),
            "tolerance": shared["tol"],
            "reading": MERGEKIT,
        },
        shared={"max_iter": 10.0, "tol": 1e-5},
        base="input",
    ),
    "sce": Translation(
        "sce",
        lambda _, shared: {"density": shared["select_topk"], "reading": MERGEKIT},
        shared={"select_topk": 1.0},
    ),
    "nearswap": Translation(
        "nearswap",
        lambda _, shared: {"t": shared["t"], "reading": MERGEKIT},
        shared={"t": REQUIRED},
        others=1,
    ),
    "arcee_fusion": Translation("arcee_fusion", lambda _, __: {}, others=1),
    "ram": Translation("ram", lambda _, shared: {"threshold": shared["epsilon"]}, shared={"epsilon": 1e-5}),
}
"""By mergekit's names."""

WITHOUT_BASE: Mapping[str, Translation] = {
    "nuslerp": Translation(
        "slerp", _nuslerp_of_weights, {"weight": REQUIRED}, {"nuslerp_flatten": True}, base="input", others=2
    ),
    "multislerp": Translation(
        "multislerp", _multislerp("zero"), {"weight": REQUIRED}, {"normalize_weights": True}, base="input"
    ),
}
"""What some of them are where no base model is named."""

PARAMETERS = sorted(
    {name for each in TRANSLATIONS.values() for name in (*each.per_model, *each.shared)} | {_IGNORED}
)
"""All that any of these methods reads. mergekit passes over what another method would read, and so does this."""
