"""What a human-designed method is: its function, its parameters with their search ranges, its paper."""

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Stack
from selfdev.errors import UserError
from selfdev.names import nearest

# How many values of each parameter a grid takes, by the number of parameters that vary: 10 or 9 settings. Ten
# points put the densities, searched from 0.1 to 1, on the round values that people and models write.
_GRID_POINTS = {1: 10, 2: 3}

PAPER, MERGEKIT = "paper", "mergekit"
"""The readings of a formula: the paper's, and that of mergekit 0.1.5 where it differs."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method and the range in which tuning searches.

    Attributes:
        name: keyword of the method's function.
        default: the value used when none is given; None lets the function choose.
        low: lower end of the search range; a method may accept values beyond it. None where tuning leaves the
            parameter alone, as it does with weights and with flags that choose a reading of the paper.
        high: upper end of the search range, itself included; None with `low`.
        log: search on a logarithmic scale; needs `low > 0`.
        per_expert: a list with one value for each expert instead of a single one.
        broadcast: such a list, or a single number for all experts.
        integer: whole numbers only.
        screened: whether `grid` varies it. Screening compares merged task vectors up to a constant factor,
            so that a plain factor need not vary, nor a random seed.
        choices: the only values it takes; empty if it takes numbers.
    """

    name: str
    default: float | str | None
    low: float | None = None
    high: float | None = None
    log: bool = False
    per_expert: bool = False
    broadcast: bool = False
    integer: bool = False
    screened: bool = True
    choices: tuple[str | bool, ...] = ()

    @property
    def searched(self) -> bool:
        """Whether tuning draws it from a range."""
        return self.low is not None and self.high is not None

    def _at(self, share: float) -> float:
        """Return the value that lies at `share` (0 to 1) of the range."""
        low, high = self._range()
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        # Six digits are enough to search with, and 0.1 + 2 * 0.1 is the 0.3 that someone would write.
        value = min(max(float(f"{value:.6g}"), low), high)
        return round(value) if self.integer else value

    def _range(self) -> tuple[float, float]:
        if self.low is None or self.high is None:
            raise ValueError(f"parameter '{self.name}' has no search range")
        return self.low, self.high

    def sample(self, rng: random.Random) -> float:
        """Draw one value of the search range (for a per-expert parameter: the value of one expert)."""
        if self.integer and not self.log:
            low, high = self._range()
            return rng.randint(int(low), int(high))
        return self._at(rng.random())

    def grid(self, points: int) -> list[float]:
        """Return up to `points` distinct values, evenly spread from `low` to `high`."""
        if points == 1:
            return [self._at(0.5)]
        return list(dict.fromkeys(self._at(index / (points - 1)) for index in range(points)))

    def check(self, method: str, experts: int, value: object) -> None:
        """Raise UserError unless the parameter takes this value with this number of experts."""
        owner = f"parameter '{self.name}' of method '{method}'"
        if self.choices:
            # True is no 1: the type must be right as well.
            if not any(type(value) is type(choice) and value == choice for choice in self.choices):
                known = (str(each).lower() if isinstance(each, bool) else each for each in self.choices)
                raise UserError(f"{owner} is {value!r}; it takes {' or '.join(known)}")
            return
        values = value if isinstance(value, list | tuple) else [value]
        listed = values is value
        if (self.per_expert and not listed) or (
            listed and not ((self.per_expert or self.broadcast) and len(values) == experts)
        ):
            raise UserError(
                f"{owner} is {value!r}, which is not a list with one value for each of the {experts} experts; "
                + (f"give {experts} values" if experts > 1 else f"write [{value}]")
                if self.per_expert or self.broadcast
                else f"{owner} is {value!r}, which is no number; give one for all experts"
            )
        for each in values:
            whole = isinstance(each, int) and not isinstance(each, bool) and abs(each) < 2**63
            if not (whole or (isinstance(each, float) and not self.integer)):
                kind = "whole number" if self.integer else "number"
                raise UserError(f"{owner} is {value!r}, which is no {kind}; give one")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; `arxiv` is None for work that is not on arXiv."""

    authors: str
    year: int
    arxiv: str | None

    def __str__(self) -> str:
        source = f"arXiv {self.arxiv}" if self.arxiv else "not on arXiv"
        return f"{self.authors} {self.year}, {source}"


@dataclass(frozen=True)
class Method:
    """A human-designed merging method.

    Attributes:
        name: the function's name.
        function: pure function of stacked task vectors, shape (experts, *parameter), float32, that returns
            the merged task vector, shape (*parameter).
        parameters: its keyword parameters.
        paper: the source of the formula.
        summary: one line for lists of methods.
        needs_seed: whether the function takes the seed's tensor, shape (*parameter), as second argument.
        needs_seed_with: a parameter and its value with which alone the function takes it.
        experts: the only number of experts it takes; None if it takes any.
        entrywise: whether each entry of the result follows from the values of that entry alone, so that a tensor
            merged in parts is the same to the last bit.
        by_parts: where that holds once something is known of the whole, as thresholds are: given the task vectors
            to look at and all parameters, it gives what merges parts, from shape (experts, n) to (n,).
            Only for the paper's reading, without rescaling.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    paper: Paper
    summary: str
    needs_seed: bool = False
    needs_seed_with: tuple[str, str | bool] | None = None
    experts: int | None = None
    entrywise: bool = False
    by_parts: Callable[..., Callable[[Tensor], Tensor]] | None = None

    def in_parts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether `merger_of_parts` takes these parameters."""
        readings = parameters.get(READING.name, PAPER) == PAPER and not parameters.get(RESCALE.name)
        return self.entrywise or (self.by_parts is not None and readings)

    def merger_of_parts(
        self, stack: Stack, parameters: Mapping[str, Any]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Look at task vectors as far as needed; gives what merges a part of them and of the seed's tensor.

        The parts that are merged are the same to the last bit as in the whole.

        Args:
            stack: the task vectors.
            parameters: values by name, which have been checked; those left out take their default.
        """
        assert self.in_parts(parameters), f"{self.name} with {parameters} is merged whole"
        if self.by_parts is None:
            return lambda part, seed: self.merge(part, seed, **parameters)
        defaults = {parameter.name: parameter.default for parameter in self.parameters}
        merged = self.by_parts(stack, **{**defaults, **parameters})
        return lambda part, _: merged(part)

    def sample(self, rng: random.Random, experts: int) -> dict[str, Any]:
        """Draw a setting of all searched parameters, for tuning on `experts` experts."""
        return {
            parameter.name: (
                [parameter.sample(rng) for _ in range(experts)]
                if parameter.per_expert
                else parameter.sample(rng)
            )
            for parameter in self.parameters
            if parameter.searched
        }

    def grid(self, experts: int) -> list[dict[str, Any]]:
        """Return 1 to 11 settings whose merged task vectors point in different directions.

        The first one is the default. Screening recognises a known behaviour by them.
        """
        default = self.defaults(experts)
        varied = [
            parameter
            for parameter in self.parameters
            if parameter.searched and parameter.screened and not parameter.per_expert
        ]
        if not varied:
            return [default]
        points = _GRID_POINTS.get(len(varied), 2)
        names = [parameter.name for parameter in varied]
        product = itertools.product(*(parameter.grid(points) for parameter in varied))
        settings = [{**default, **dict(zip(names, values, strict=True))} for values in product]
        return [default, *(setting for setting in settings if setting != default)]

    def defaults(self, experts: int) -> dict[str, Any]:
        """Return the default setting of the searched parameters, without what the function chooses itself."""
        return {
            parameter.name: [parameter.default] * experts if parameter.per_expert else parameter.default
            for parameter in self.parameters
            if parameter.searched and parameter.default is not None
        }

    def merge(self, task_vectors: Tensor, seed_tensor: Tensor | None = None, **parameters: Any) -> Tensor:
        """Merge stacked task vectors.

        Args:
            task_vectors: shape (experts, *parameter), float32.
            seed_tensor: the seed's tensor, shape (*parameter); needed if `needs_seed`, or with the parameter of
                `needs_seed_with`; ignored otherwise.
            **parameters: values by name; those left out take their default.

        Returns:
            The merged task vector, shape (*parameter).

        Raises:
            UserError: an unknown parameter, a value that it does not take, no seed's tensor where it is needed,
                or a number of experts that the method does not take.
        """
        experts = len(task_vectors)
        self.check(experts, parameters)
        if task_vectors[0].numel() == 0:
            return torch.zeros_like(task_vectors[0])
        name, value = self.needs_seed_with or ("", None)
        if not (self.needs_seed or (name in parameters and parameters[name] == value)):
            return self.function(task_vectors, **parameters)
        if seed_tensor is None:
            raise UserError(
                f"method '{self.name}' needs the seed's tensor, and none was given; pass seed_tensor"
            )
        return self.function(task_vectors, seed_tensor, **parameters)

    def check(self, experts: int, parameters: dict[str, Any]) -> None:
        """Raise UserError unless the method takes this number of experts and these parameters."""
        if experts < 1 or (self.experts is not None and experts != self.experts):
            takes = "at least 1" if self.experts is None else f"exactly {self.experts}"
            way_out = "choose the experts anew"
            if experts == 1:
                way_out = "name another one, which may be the seed itself (--expert base=SEED)"
            raise UserError(f"method '{self.name}' takes {takes} experts, not {experts}; {way_out}")
        known = {parameter.name: parameter for parameter in self.parameters}
        for name, value in parameters.items():
            if (ours := MERGEKITS_NAMES.get(name)) in known and name not in known:
                raise UserError(
                    f"unknown parameter of method '{self.name}': '{name}', as mergekit calls it; here it is '{ours}'"
                )
            if name not in known:
                raise UserError(unknown_name(f"parameter of method '{self.name}'", name, list(known)))
            known[name].check(self.name, experts, value)


READING = Parameter("reading", default=PAPER, choices=(PAPER, MERGEKIT))
"""The flag of every method that mergekit reads differently."""

WEIGHTS = Parameter("weights", default=None, per_expert=True)
"""A factor on each expert, where tuning searches a common scale instead."""

NORMALIZE = Parameter("normalize", default=None, choices=(True, False))
"""Whether a sum is divided; None for what the method's own formula does."""

RESCALE = Parameter("rescale", default=None, choices=(True, False))
"""Whether what is left of an expert makes up for what was dropped; None for what the method's own formula does."""

SEED = Parameter("seed", default=0, low=0, high=2**31 - 1, integer=True, screened=False)
"""The seed of a method that draws at random."""


MERGEKITS_NAMES = {
    "lambda": "scale",
    "weight": "weights",
    "gamma": "outliers",
    "select_topk": "density",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
    "max_iter": "steps",
    "tol": "tolerance",
}
"""What mergekit calls parameters that are named otherwise here; only `--config` reads them as it does."""


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Return the message for an unknown name, which gives the nearest known one."""
    return f"unknown {kind}: '{name}'; {nearest(name, known)}"
