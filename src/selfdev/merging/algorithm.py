"""What merges: a method of the library, a program in the jail, or a file that its user trusts.

The three give the same as everywhere else in the project: methods draw from the same seeds for each tensor, and a
candidate of a run gets the seeds that it had when it was scored.
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from selfdev.algorithms.library import Method
from selfdev.algorithms.library.blocks import Stack
from selfdev.algorithms.source import ENTRY
from selfdev.errors import SelfdevError, UserError
from selfdev.merging.task_vectors import merge_tensor
from selfdev.sandbox import Context, Limits, Sandbox, SandboxUnavailable

_JAIL_BATCH = 64 * 1024**2
"""Bytes of task vectors that go to the jail together; a fork costs more than merging a small tensor."""

_SLOWEST = 20e6
"""Bytes of task vectors a second that a program must merge, beside its limit for small ones, before it is ended."""


MergePart = Callable[[Tensor, Tensor], Tensor]
"""From task vectors of shape (experts, n) and that part of the seed's tensor, (n,), to the merged task vector, (n,)."""


@dataclass(frozen=True)
class Inputs:
    """One parameter tensor and what its experts made of it, or a part of the two.

    Attributes:
        experts: their names, in the order of `task_vectors`.
        task_vectors: shape (experts, *parameter), float32.
        context: the seed's tensor, the parameter's name, its layer and the number of layers.
    """

    experts: Sequence[str]
    task_vectors: Tensor
    context: Context

    @property
    def model_dict(self) -> dict[str, Tensor]:
        """The task vectors as the contract wants them."""
        return dict(zip(self.experts, self.task_vectors, strict=True))


@dataclass(frozen=True)
class Origin:
    """Where an algorithm comes from, for the model card.

    Attributes:
        title: one line.
        source: its Python source.
        evidence: lines of Markdown; empty if there is none.
    """

    title: str
    source: str
    evidence: Sequence[str] = ()


class Algorithm(Protocol):
    """What streaming needs of an algorithm."""

    @property
    def origin(self) -> Origin:
        """For the model card."""
        ...

    @property
    def batch_bytes(self) -> int:
        """Bytes of task vectors that are merged in one call; a larger tensor is merged alone."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether `merge` may be called by several threads at a time; otherwise its calls keep their order."""
        ...

    def in_parts(self, name: str, layers: int) -> Callable[[Stack], MergePart] | None:
        """What looks at a tensor's task vectors and gives what merges its parts, if it may be merged so.

        Only with `concurrent`. The tensor is that of a name in a model of so many layers.
        """
        ...

    def merge(self, batch: Sequence[Inputs]) -> list[Tensor]:
        """The merged task vector of each, of its parameter's shape."""
        ...


@dataclass(frozen=True)
class Found:
    """An algorithm that is not ready yet: what is known before the models are.

    Attributes:
        targets: what it merges unless the user says otherwise.
        opened: makes it ready, given the names of the experts and the entries of the largest tensor.
    """

    targets: str
    opened: Callable[[int, int], AbstractContextManager[Algorithm]]


@dataclass(frozen=True)
class LibraryMethod:
    """A human-designed method.

    Attributes:
        method: of the library.
        parameters_of: gives its parameters for the tensor of a name, in a model of so many layers.
    """

    method: Method
    parameters_of: Callable[[str, int], Mapping[str, Any]]
    batch_bytes: ClassVar[int] = 0
    concurrent: ClassVar[bool] = True

    @property
    def origin(self) -> Origin:
        """The method's function and its paper."""
        return Origin(
            f"`{self.method.name}`: {self.method.summary} ({self.method.paper})",
            inspect.getsource(sys.modules[self.method.function.__module__]),
        )

    def merge(self, batch: Sequence[Inputs]) -> list[Tensor]:
        return [
            merge_tensor(
                self.method,
                self.parameters_of(each.context.name, each.context.layers),
                each.context.name,
                each.task_vectors,
                each.context.seed,
            )
            for each in batch
        ]

    def in_parts(self, name: str, layers: int) -> Callable[[Stack], MergePart] | None:
        parameters = self.parameters_of(name, layers)
        if not self.method.in_parts(parameters):
            return None
        return lambda stack: self.method.merger_of_parts(stack, parameters)


@dataclass(frozen=True)
class JailedProgram:
    """A program that runs in the jail.

    Attributes:
        origin: where it comes from; its source is what runs.
        box: a sandbox that has been entered.
        seed_of: gives a tensor's random seed by its name.
        factor: what the merged task vectors are multiplied by.
        way_out: for the user, where it fails.
    """

    origin: Origin
    box: Sandbox
    seed_of: Callable[[str], int]
    factor: float = 1.0
    way_out: str = "choose another"
    batch_bytes: ClassVar[int] = _JAIL_BATCH
    concurrent: ClassVar[bool] = False

    def merge(self, batch: Sequence[Inputs]) -> list[Tensor]:
        outcomes = self.box.merge_many(
            self.origin.source,
            [each.model_dict for each in batch],
            contexts=[each.context for each in batch],
            seeds=[self.seed_of(each.context.name) for each in batch],
        )
        merged = []
        for each, outcome in zip(batch, outcomes, strict=True):
            if outcome.tensor is None:
                raise SelfdevError(
                    f"the algorithm fails on tensor '{each.context.name}' of shape "
                    f"{tuple(each.context.seed.shape)}: {outcome.failure}: {outcome.error}; {self.way_out}"
                )
            merged.append(outcome.tensor if self.factor == 1 else self.factor * outcome.tensor)
        return merged

    def in_parts(self, name: str, layers: int) -> None:
        """A program sees tensors whole."""


@contextmanager
def jail(limits: Limits, experts: int, largest: int, hint: str = "") -> Iterator[Sandbox]:
    """A sandbox for the tensors of a checkpoint.

    Args:
        limits: for small tensors. Time and memory grow with the tensors from there.
        experts: how many.
        largest: entries of the largest tensor.
        hint: a further way out for the user where there is no jail.

    Raises:
        SelfdevError: the jail cannot be built here.
    """
    size = 4 * experts * largest
    seconds = limits.wall_seconds + max(size, _JAIL_BATCH) / _SLOWEST
    grown = Limits(seconds, 2 * seconds + 1, max(limits.memory_bytes, 4 * size), limits.source_bytes)
    try:
        with Sandbox(grown) as box:
            yield box
    except SandboxUnavailable as error:
        raise SelfdevError(
            f"{error}\nModel-written code runs in the jail or not at all; `selfdev doctor` says what is missing.{hint}"
        ) from error


@dataclass(frozen=True)
class TrustedFile:
    """A file of the user's own that runs in this process, with all of the user's rights.

    Attributes:
        path: of the file.
        seed_of: gives a tensor's random seed by its name; torch's and Python's generators are seeded with it for
            the call, and put back afterwards.
    """

    path: Path
    seed_of: Callable[[str], int]
    batch_bytes: ClassVar[int] = 0
    concurrent: ClassVar[bool] = False
    _loaded: list[Callable[..., Any]] = field(default_factory=list, repr=False)

    @property
    def origin(self) -> Origin:
        """The file."""
        return Origin(f"`{self.path.name}`, run as a trusted file", self.path.read_text("utf-8-sig"))

    def merge(self, batch: Sequence[Inputs]) -> list[Tensor]:
        return [self._merge(each) for each in batch]

    def in_parts(self, name: str, layers: int) -> None:
        """A program sees tensors whole."""

    def _merge(self, inputs: Inputs) -> Tensor:
        function = self._function()
        arguments: list[Any] = [inputs.model_dict, "cpu"]
        if takes_context(function):
            # Its own seed: what it did to ours, the model would get.
            arguments.append(replace(inputs.context, seed=inputs.context.seed.clone()))
        shape = inputs.context.seed.shape
        where = f"'{self.path}' on tensor '{inputs.context.name}' of shape {tuple(shape)}"
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                seed = self.seed_of(inputs.context.name)
                torch.default_generator.manual_seed(seed)
                random.seed(seed)
                value = function(*arguments)
                if not isinstance(value, Tensor) or value.shape != shape or value.is_complex():
                    returned = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise TypeError(
                        f"it returns {returned}, and the merged task vector has the parameter's shape"
                    )
                if value.layout is not torch.strided:
                    value = value.to_dense()
                merged: Tensor = value.detach().to("cpu", torch.float32).contiguous()
        except (Exception, SystemExit) as error:
            raise SelfdevError(f"{where} raises {type(error).__name__}: {error}") from error
        finally:
            random.setstate(state)
        return merged

    def _function(self) -> Callable[..., Any]:
        """The file's `merge_models`, imported once."""
        if not self._loaded:
            specification = spec_from_file_location("selfdev_trusted_file", self.path)
            if specification is None or specification.loader is None:
                raise UserError(f"'{self.path}' is no Python file; give a file *.py")
            module = module_from_spec(specification)
            sys.modules[specification.name] = module  # where dataclasses look up what their annotations name
            try:
                specification.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                raise UserError(
                    f"'{self.path}' cannot be imported: {type(error).__name__}: {error}"
                ) from error
            function = getattr(module, ENTRY, None)
            if not callable(function):
                raise UserError(
                    f"'{self.path}' defines no {ENTRY}(model_dict, device); see docs/algorithms.md"
                )
            self._loaded.append(function)
        return self._loaded[0]


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether the third parameter is the context: it is named so, or has no default of its own."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a function of C that does not tell
        return False
    positional = [
        each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    return len(positional) >= 3 and (
        positional[2].name == "context" or positional[2].default is inspect.Parameter.empty
    )
