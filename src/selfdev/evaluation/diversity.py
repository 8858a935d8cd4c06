"""How inventive an arm is in one iteration: what is distinct among its working programs, and what they copy."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from selfdev.algorithms.screening import Behaviour
from selfdev.archive import Candidate

_EXAMPLE = "example "
"""Begins the name of a worked example where a candidate is nearest to one."""


@dataclass(frozen=True)
class Diversity:
    """Diversity of behaviours, not of texts.

    Attributes:
        entropy: of the behaviours of the working programs, nats: log n where all n differ, 0 where all are one. All
            trivial programs count as one behaviour.
        copies: share of the working programs that behave like a worked example which their prompt shows, in 0..1.
        distance: median distance of the new programs to the nearest program that the arm wrote before them, relative;
            None where there is none before.
    """

    entropy: float
    copies: float
    distance: float | None


def diversity(
    written: Sequence[Candidate], earlier: Sequence[Candidate], prompts: Sequence[str]
) -> Diversity:
    """Measure one iteration of one arm.

    Args:
        written: its programs, screened, in the order in which they were written.
        earlier: those of the arm's earlier iterations.
        prompts: texts, as `Candidate.prompt` counts them.
    """
    working = [c for c in written if c.works]
    counts = Counter(_kind(c) for c in working)
    shares = [count / len(working) for count in counts.values()]
    copies = sum(_is_copy(c, prompts[c.prompt]) for c in working)
    before = [Behaviour.from_bytes(c.behaviour) for c in earlier if c.works and c.behaviour is not None]
    distances = []
    for candidate in working:
        if candidate.behaviour is None:
            continue
        behaviour = Behaviour.from_bytes(candidate.behaviour)
        if candidate.status == "new" and before:
            distances.append(float(behaviour.distances(torch.stack([b.entries for b in before])).min()))
        before.append(behaviour)
    return Diversity(
        entropy=sum(share * math.log(1 / share) for share in shares),
        copies=copies / len(working) if working else 0.0,
        distance=float(torch.tensor(distances).median()) if distances else None,
    )


def _kind(candidate: Candidate) -> str:
    if candidate.status == "new":
        return candidate.name
    return "trivial" if candidate.status == "trivial" else candidate.nearest or candidate.name


def _is_copy(candidate: Candidate, prompt: str) -> bool:
    nearest = candidate.nearest or ""
    return (
        candidate.status == "known"
        and nearest.startswith(_EXAMPLE)
        and f"def merge_{nearest.removeprefix(_EXAMPLE)}(" in prompt
    )
