"""How inventive an arm is in one iteration: what is distinct among its working programs, and what they copy."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from selfdev.algorithms.screening import Behaviour
from selfdev.algorithms.source import unwrap_short
from selfdev.archive import Candidate

RAREFIED_TO = 10
"""Working programs among which distinct behaviours are expected, so that arms of which more work are comparable."""

_EXAMPLE = "example "
"""Begins the name of a worked example where a candidate is nearest to one."""


@dataclass(frozen=True)
class Diversity:
    """Diversity of behaviours, not of texts.

    Attributes:
        entropy: of the behaviours of the working programs, nats: log n where all n differ, 0 where all are one. All
            trivial programs count as one behaviour.
        distinct: how many behaviours the working programs have.
        rarefied: how many a draw of `RAREFIED_TO` of them is expected to have; None where fewer work. Entropy and
            `distinct` grow with the number of working programs alone, this does not.
        copies: share of the working programs that behave like what their prompt shows, a worked example or one of the
            arm's own programs, in 0..1.
        distance: median distance of the new programs to the nearest program that the arm wrote before them, relative;
            None where there is none before.
    """

    entropy: float
    distinct: int
    rarefied: float | None
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
    own = {c.name: unwrap_short(c.source) for c in earlier if c.source}
    copies = sum(_is_copy(c, prompts[c.prompt], own) for c in working)
    behaving = [c for c in [*earlier, *written] if c.works and c.behaviour is not None]
    behaviours = [Behaviour.from_bytes(c.behaviour or b"") for c in behaving]
    entries = torch.stack([each.entries for each in behaviours]) if behaviours else torch.empty(0)
    first = len(behaving) - sum(c.behaviour is not None for c in working)
    distances = [
        float(behaviours[place].distances(entries[:place]).min())
        for place in range(max(first, 1), len(behaving))
        if behaving[place].status == "new"
    ]
    return Diversity(
        entropy=sum(share * math.log(1 / share) for share in shares),
        distinct=len(counts),
        rarefied=rarefied(list(counts.values()), RAREFIED_TO),
        copies=copies / len(working) if working else 0.0,
        distance=float(torch.tensor(distances).median()) if distances else None,
    )


def _kind(candidate: Candidate) -> str:
    if candidate.status == "new":
        return candidate.name
    return "trivial" if candidate.status == "trivial" else candidate.nearest or candidate.name


def rarefied(counts: Sequence[int], drawn: int) -> float | None:
    """The expected number of kinds in a draw without replacement: rarefaction (Hurlbert 1971).

    It is the sum over the kinds of 1 - C(N - N_i, n) / C(N, n), for n of N individuals, N_i of them of kind i.

    Args:
        counts: individuals of each kind.
        drawn: n, at least 1.

    Returns:
        In 1..drawn; None where there are fewer individuals than that.
    """
    total = sum(counts)
    if total < drawn:
        return None
    ways = math.comb(total, drawn)
    return sum(ways - math.comb(total - count, drawn) for count in counts) / ways


def _is_copy(candidate: Candidate, prompt: str, own: Mapping[str, str]) -> bool:
    nearest = candidate.nearest or ""
    if candidate.status == "repeated":
        return nearest in own and own[nearest] in prompt
    return (
        candidate.status == "known"
        and nearest.startswith(_EXAMPLE)
        and f"def merge_{nearest.removeprefix(_EXAMPLE)}(" in prompt
    )
