"""Screening: does a program run, and is it new?

A program is run on probe tensors in the jail. What it returns there is its *behaviour*, and decides, with its
canonical form, what it is:

- ``trivial``: one constant linear combination of the task vectors explains every probe (zero, a copy of an
  expert, a scaled mean, Task Arithmetic with a weight for each expert);
- ``known``: a worked example, or a method of the library at some point of its parameter grid, up to a factor;
- ``repeated``: an earlier candidate of the same history, up to a factor;
- ``new``: everything else that works.

Distances are relative: 0.01 means that what the other program does not explain has 1 % of the output's norm, on the
probe where the two differ most. Two programs within `TOLERANCE` are one: the mean plus a speck is the mean.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from selfdev.algorithms.examples import examples
from selfdev.algorithms.library import methods
from selfdev.algorithms.source import canonical, wrap_short
from selfdev.sandbox import Context

TOLERANCE = 0.01
REAL_TOLERANCE = 0.05
"""On the experts' own task vectors a program must stand further off a linear combination than on probes.

A softmax over entries of 0.01 differs from the mean by 2 % there, whatever it does with the larger entries of a
probe, and scores what the mean scores.
"""
PROBE_SEED = 20241021


class Novelty(StrEnum):
    """What a working program is."""

    TRIVIAL = "trivial"
    KNOWN = "known"
    REPEATED = "repeated"
    NEW = "new"


class Outcome(Protocol):
    """What the sandbox says of one call (`selfdev.sandbox.Outcome`)."""

    @property
    def tensor(self) -> Tensor | None: ...
    @property
    def failure(self) -> str: ...
    @property
    def error(self) -> str: ...


class Box(Protocol):
    """Where programs run (`selfdev.sandbox.Sandbox`)."""

    def merge_many(
        self,
        source: str,
        model_dicts: Sequence[Mapping[str, Tensor]],
        *,
        contexts: Sequence[Context | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Sequence[Outcome]: ...


@dataclass(frozen=True)
class Probe:
    """Made-up task vectors.

    Attributes:
        name: what is special about it.
        task_vectors: shape (experts, *parameter), float32.
        context: a made-up seed's tensor in a made-up layer, for programs that ask for it.
    """

    name: str
    task_vectors: Tensor
    context: Context

    @property
    def model_dict(self) -> dict[str, Tensor]:
        """The task vectors as the contract wants them."""
        return {f"expert_{i}": vector for i, vector in enumerate(self.task_vectors)}


def _probe(
    name: str, experts: int, shape: tuple[int, ...], scale: float, *, dense: float = 1.0, shared: float = 0.3
) -> Probe:
    """Draw a probe; `dense` is the share of entries that are not zero, `shared` what the experts have in common."""
    stream = torch.Generator().manual_seed(PROBE_SEED + sum(map(ord, name)))
    common = torch.randn(shape, generator=stream)
    own = torch.randn((experts, *shape), generator=stream)
    # Entries of fine-tuned models have heavier tails than the normal distribution, and experts differ in norm.
    heavy = own * own.abs().sqrt()
    size = torch.linspace(0.7, 1.4, experts).reshape(-1, *(1 for _ in shape))
    kept = torch.rand((experts, *shape), generator=stream) < dense
    seed = torch.randn(shape, generator=stream)
    context = Context(seed, "model.layers.1.mlp.up_proj.weight", 1, 4)
    return Probe(name, scale * size * (shared * common + heavy) * kept, context)


PROBES: tuple[Probe, ...] = tuple(
    probe
    for experts in (4, 2)
    for probe in (
        _probe(f"wide {experts}", experts, (12, 20), 1e-2),
        _probe(f"tall {experts}", experts, (24, 10), 1.0),
        _probe(f"vector {experts}", experts, (33,), 0.1),
        _probe(f"large {experts}", experts, (30, 40), 1e-3, shared=0.6),
        _probe(f"sparse {experts}", experts, (16, 14), 10.0, dense=0.4),
        _probe(f"alike {experts}", experts, (9, 13), 0.1, shared=3.0),
    )
)
_REPEAT = 0
"""The probe that is run a second time, last, with another seed: a program must say the same again.

So programs that draw random numbers are rejected, on purpose: DARE with another mask would look like an invention.
"""


_SIZES = [probe.task_vectors[0].numel() for probe in PROBES]
_HALF = len(PROBES) // 2
_GROUPS = (
    (slice(0, _HALF), slice(0, sum(_SIZES[:_HALF]))),
    (slice(_HALF, None), slice(sum(_SIZES[:_HALF]), None)),
)
"""For each number of experts: its probes, and its entries in a behaviour. One fit must explain all of a group."""


@dataclass(frozen=True)
class Behaviour:
    """What a program returns on the probes.

    Attributes:
        entries: the outputs one after the other, each divided by the norm of its probe's task vectors; float64.
    """

    entries: Tensor

    @classmethod
    def of(cls, merged: Iterable[Tensor]) -> "Behaviour":
        """Make it from one merged tensor a probe."""
        pieces = [
            out.double().flatten() / probe.task_vectors.double().norm()
            for out, probe in zip(merged, PROBES, strict=True)
        ]
        return cls(torch.cat(pieces))

    def to_bytes(self) -> bytes:
        """The entries as float32, for the archive."""
        return bytes(self.entries.float().numpy().tobytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Behaviour":
        """The inverse of `to_bytes`."""
        return cls(torch.frombuffer(bytearray(data), dtype=torch.float32).double())

    def distances(self, others: Tensor) -> Tensor:
        """How far this is from other behaviours, up to one factor for each number of experts.

        Args:
            others: shape (behaviours, entries).

        Returns:
            Shape (behaviours,): 0 for the same behaviour, about 1 for an unrelated one.
        """
        worst = others.new_zeros(len(others))
        for probes, span in _GROUPS:
            mine, theirs = self.entries[span], others[:, span]
            factor = (theirs @ mine) / theirs.square().sum(1).clamp(min=1e-30)
            worst = torch.maximum(worst, _relative(mine - factor[:, None] * theirs, mine, _SIZES[probes]))
        return worst

    def distance(self, other: "Behaviour") -> float:
        """How far this is from one other behaviour."""
        return float(self.distances(other.entries[None])[0])

    def distance_to_trivial(self) -> float:
        """How far this is from the nearest constant linear combination of the task vectors."""
        worst = 0.0
        for probes, span in _GROUPS:
            vectors = [probe.task_vectors.double().flatten(1).T for probe in PROBES[probes]]
            columns = torch.cat([vector / vector.norm() for vector in vectors])
            worst = max(worst, _unexplained(self.entries[span], columns, _SIZES[probes]))
        return worst


def _unexplained(target: Tensor, columns: Tensor, sizes: Sequence[int]) -> float:
    """Relative residual, on the worst piece, of one least-squares fit of `target` by `columns`."""
    solution = torch.linalg.lstsq(columns, target[:, None]).solution
    return float(_relative((target - (columns @ solution)[:, 0])[None], target, sizes)[0])


def _relative(residuals: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
    """The norm of each residual against the target's, on the piece where that ratio is largest.

    Args:
        residuals: shape (fits, entries).
        target: shape (entries,).
        sizes: entries of each piece.

    Returns:
        Shape (fits,). A piece far smaller than the others is measured against a hundredth of their size, and a
        target that is zero everywhere is explained by anything.
    """
    floor = _floor(target.norm(), len(sizes))
    pieces = zip(residuals.split(list(sizes), 1), target.split(list(sizes)), strict=True)
    return torch.stack([left.norm(dim=1) / torch.maximum(out.norm(), floor) for left, out in pieces]).amax(0)


def _floor(norm: Tensor, pieces: int) -> Tensor:
    """The least that a piece's residual is measured against, by the norm of all pieces together."""
    return (norm * (0.01 / math.sqrt(pieces))).clamp(min=1e-12)


@dataclass(frozen=True)
class Screening:
    """What screening says of one program.

    Attributes:
        novelty: None if the program does not work.
        failure: class of the failure; empty if it works.
        error: what happened; empty if it works.
        canonical: identity up to names and constants; empty if it does not work.
        behaviour: None if it does not work.
        nearest: what it is, or, if it is new, the nearest trivial or known program.
        distance: to that, relative; None if it does not work.
    """

    novelty: Novelty | None
    failure: str = ""
    error: str = ""
    canonical: str = ""
    behaviour: Behaviour | None = None
    nearest: str = ""
    distance: float | None = None


@dataclass
class History:
    """The working programs of one arm so far, by name: what a later one may not repeat."""

    forms: dict[str, str] = field(default_factory=dict)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, screening: Screening) -> None:
        """Remember a working program; a repetition counts under the name of what it repeats."""
        if screening.behaviour is not None:
            original = screening.nearest if screening.novelty is Novelty.REPEATED else name
            self.forms.setdefault(screening.canonical, original)
            self.behaviours[name] = screening.behaviour
            self.originals[name] = original

    def nearest(self, behaviour: Behaviour) -> tuple[str, float]:
        """The original that behaves most like this one, and its distance; infinite if there is none."""
        if not self.behaviours:
            return "", float("inf")
        distances = behaviour.distances(torch.stack([b.entries for b in self.behaviours.values()]))
        index = int(distances.argmin())
        return self.originals[list(self.behaviours)[index]], float(distances[index])


class Screen:
    """Runs programs on the probes and sorts them.

    Args:
        box: where programs run. Human-designed methods run outside it.
    """

    def __init__(self, box: Box):
        self.box = box
        self.known = History()
        for name, behaviour in _library_behaviours():
            self.known.add(name, Screening(Novelty.KNOWN, canonical=f"method {name}", behaviour=behaviour))
        for name, short in examples().items():
            source = wrap_short(short)
            ran = self._run(source)
            if isinstance(ran, Screening):
                raise RuntimeError(f"example '{name}' fails on the probes: {ran.failure}: {ran.error}")
            self.known.add(f"example {name}", Screening(Novelty.KNOWN, "", "", canonical(source), ran))

    def __call__(self, source: str, history: History) -> Screening:
        """Screen one program in the contract's form against what the same arm wrote before."""
        behaviour = self._run(source)
        if isinstance(behaviour, Screening):
            return behaviour
        try:
            form = canonical(source)
        except (RecursionError, MemoryError):
            return Screening(
                None, "TooDeep", "its syntax tree is nested too deeply to be compared with others"
            )
        trivial = behaviour.distance_to_trivial()
        known, known_distance = self.known.nearest(behaviour)
        earlier, earlier_distance = history.nearest(behaviour)
        nearest, distance = min((trivial, "linear combination"), (known_distance, known))[::-1]
        if trivial <= TOLERANCE:
            novelty = Novelty.TRIVIAL
        elif form in self.known.forms or known_distance <= TOLERANCE:
            novelty, nearest = Novelty.KNOWN, self.known.forms.get(form, known)
            distance = behaviour.distance(self.known.behaviours[nearest])
        elif form in history.forms or earlier_distance <= TOLERANCE:
            # Of one form it may be and still, by another constant, behave as something else did.
            original = earlier if earlier_distance <= TOLERANCE else history.forms[form]
            novelty, nearest = Novelty.REPEATED, original
            distance = behaviour.distance(history.behaviours[nearest])
        else:
            novelty = Novelty.NEW
        # The last digits of a least-squares fit vary from call to call; the archive must not.
        return Screening(novelty, "", "", form, behaviour, nearest, float(f"{distance:.4g}"))

    def _run(self, source: str) -> Behaviour | Screening:
        probes = [*PROBES, PROBES[_REPEAT]]
        seeds = [*range(len(PROBES)), len(PROBES)]
        outcomes = self.box.merge_many(
            source,
            [probe.model_dict for probe in probes],
            contexts=[probe.context for probe in probes],
            seeds=seeds,
        )
        merged: list[Tensor] = []
        for outcome, probe in zip(outcomes, probes, strict=True):
            if outcome.tensor is None:
                return Screening(None, outcome.failure, f"on probe '{probe.name}': {outcome.error}")
            merged.append(outcome.tensor)
        again = merged.pop()
        # Some LAPACK routines differ in the last bits from call to call.
        if (again - merged[_REPEAT]).norm() > 1e-5 * again.norm():
            return Screening(None, "NonDeterministic", "two runs on one probe with two seeds differ")
        behaviour = Behaviour.of(merged)
        if not behaviour.entries.float().isfinite().all():
            return Screening(
                None, "NonFinite", "on a probe its output exceeds its input beyond single precision"
            )
        return behaviour


@functools.cache
def _library_behaviours() -> tuple[tuple[str, Behaviour], ...]:
    """Every human-designed method on the probes, over the grid of its parameters."""
    found = []
    for name, method in methods().items():
        if method.experts is not None:
            continue  # no working program can be one of these: probes have other numbers of experts
        grids = [method.grid(len(probe.task_vectors)) for probe in PROBES]
        for point in range(min(map(len, grids))):
            merged = [
                method.merge(probe.task_vectors, probe.context.seed, **grid[point])
                for probe, grid in zip(PROBES, grids, strict=True)
            ]
            found.append((f"{name} {grids[0][point]}", Behaviour.of(merged)))
    return tuple(found)


def explained_by_combination(
    merged: Mapping[str, Tensor], task_vectors: Mapping[str, Mapping[str, Tensor]]
) -> float:
    """Distance of real merged tensors from one constant linear combination of the real task vectors.

    A tensor at a time is held in double precision.

    Args:
        merged: parameter name -> merged task vector.
        task_vectors: parameter name -> expert -> task vector.

    Returns:
        The largest relative residual over the tensors; a candidate within `REAL_TOLERANCE` is trivial where it
        counts, whatever it does on probes.
    """

    def scaled(name: str) -> tuple[Tensor, Tensor]:
        vectors = torch.stack([vector.flatten() for vector in task_vectors[name].values()], 1).double()
        scale = vectors.norm().clamp(min=1e-30)
        return vectors / scale, merged[name].double().flatten() / scale

    pieces = [
        (columns.T @ columns, columns.T @ target, target.norm()) for columns, target in map(scaled, merged)
    ]
    grams, products, norms = map(torch.stack, zip(*pieces, strict=True))
    # Of least norm, since experts may be combinations of each other.
    solution = torch.linalg.lstsq(grams.sum(0), products.sum(0)[:, None], driver="gelsd").solution[:, 0]
    residuals = torch.stack([(target - columns @ solution).norm() for columns, target in map(scaled, merged)])
    return float((residuals / torch.maximum(norms, _floor(norms.norm(), len(norms)))).max())
