"""What a human-designed method is: its function, its parameters with their search ranges, its paper."""

import difflib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selfdev.errors import UserError

# How many values of each parameter a grid takes, by the number of parameters that vary: 10 or 9 settings. Ten
# points put the densities, searched from 0.1 to 1, on the round values that people and models write.
_GRID_POINTS = {1: 10, 2: 3}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method and the range in which tuning searches.

    Attributes:
        name: keyword of the method's function.
        default: the value used when none is given; None lets the function choose.
        low: lower end of the search range; a method may accept values beyond it.
        high: upper end of the search range, itself included.
        log: search on a logarithmic scale; needs `low > 0`.
        per_expert: a list with one value for each expert instead of a single one.
        integer: whole numbers only.
        screened: whether `grid` varies it. Screening compares merged task vectors up to a constant factor,
            so that a plain factor need not vary, nor a random seed.
    """

    name: str
    default: float | None
    low: float
    high: float
    log: bool = False
    per_expert: bool = False
    integer: bool = False
    screened: bool = True

    def _at(self, share: float) -> float:
        """Return the value that lies at `share` (0 to 1) of the range."""
        value = (
            self.low * (self.high / self.low) ** share
            if self.log
            else self.low + share * (self.high - self.low)
        )
        # Six digits are enough to search with, and 0.1 + 2 * 0.1 is the 0.3 that someone would write.
        value = min(max(float(f"{value:.6g}"), self.low), self.high)
        return round(value) if self.integer else value

    def sample(self, rng: random.Random) -> float:
        """Draw one value of the search range (for a per-expert parameter: the value of one expert)."""
        if self.integer and not self.log:
            return rng.randint(int(self.low), int(self.high))
        return self._at(rng.random())

    def grid(self, points: int) -> list[float]:
        """Return up to `points` distinct values, evenly spread from `low` to `high`."""
        if points == 1:
            return [self._at(0.5)]
        return list(dict.fromkeys(self._at(index / (points - 1)) for index in range(points)))


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
        experts: the only number of experts it takes; None if it takes any.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    paper: Paper
    summary: str
    needs_seed: bool = False
    experts: int | None = None

    def sample(self, rng: random.Random, experts: int) -> dict[str, Any]:
        """Draw a setting of all parameters from the search range, for tuning on `experts` experts."""
        return {
            parameter.name: (
                [parameter.sample(rng) for _ in range(experts)]
                if parameter.per_expert
                else parameter.sample(rng)
            )
            for parameter in self.parameters
        }

    def grid(self, experts: int) -> list[dict[str, Any]]:
        """Return 1 to 11 settings whose merged task vectors point in different directions.

        The first one is the default. Screening recognises a known behaviour by them.
        """
        default = self.defaults(experts)
        varied = [
            parameter for parameter in self.parameters if parameter.screened and not parameter.per_expert
        ]
        if not varied:
            return [default]
        points = _GRID_POINTS.get(len(varied), 2)
        names = [parameter.name for parameter in varied]
        product = itertools.product(*(parameter.grid(points) for parameter in varied))
        settings = [{**default, **dict(zip(names, values, strict=True))} for values in product]
        return [default, *(setting for setting in settings if setting != default)]

    def defaults(self, experts: int) -> dict[str, Any]:
        """Return the default setting, leaving out what the function chooses itself."""
        return {
            parameter.name: [parameter.default] * experts if parameter.per_expert else parameter.default
            for parameter in self.parameters
            if parameter.default is not None
        }

    def merge(self, task_vectors: Tensor, seed_tensor: Tensor | None = None, **parameters: Any) -> Tensor:
        """Merge stacked task vectors.

        Args:
            task_vectors: shape (experts, *parameter), float32.
            seed_tensor: the seed's tensor, shape (*parameter); needed if `needs_seed`, ignored otherwise.
            **parameters: values by name; those left out take their default.

        Returns:
            The merged task vector, shape (*parameter).

        Raises:
            UserError: an unknown parameter, a list of the wrong length, no seed's tensor where it is needed,
                or a number of experts that the method does not take.
        """
        experts = len(task_vectors)
        self.check(experts, parameters)
        if not self.needs_seed:
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
            raise UserError(
                f"method '{self.name}' takes {takes} experts, not {experts}; choose the experts anew"
            )
        known = {parameter.name: parameter for parameter in self.parameters}
        for name, value in parameters.items():
            if name not in known:
                raise UserError(unknown_name(f"parameter of method '{self.name}'", name, list(known)))
            if known[name].per_expert and not (isinstance(value, Sequence) and len(value) == experts):
                raise UserError(
                    f"parameter '{name}' of method '{self.name}': {value!r} is not a list with one value for "
                    f"each of the {experts} experts; give {experts} values"
                )


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Return the message for an unknown name, which gives the nearest known one."""
    if not known:
        return f"unknown {kind}: '{name}'; there are none"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown {kind}: '{name}'; the nearest known one is '{nearest}' (known: {', '.join(known)})"
