"""From scores to preference pairs.

The best new programs of an iteration are *chosen*, and the elites of earlier iterations with them. *Rejected* are,
as the settings say: the worst new programs by score; programs that work but invent nothing (trivial, known,
repeated); programs that fail. Only new programs are ever chosen, whatever a trivial one scores.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence

from selfdev.archive import Candidate, Pair
from selfdev.config import Preferences


def prefer(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    iteration: int,
    settings: Preferences,
    seed: int,
    first: Mapping[str, float] | None = None,
) -> list[Pair]:
    """Make the pairs of one iteration of one arm.

    Args:
        candidates: of the arm, up to and with this iteration, all screened.
        scores: development score by name of each candidate that may be chosen, in 0..1.
        iteration: the one that has just been evaluated, from 0.
        settings: shares, floors and caps.
        seed: of the draw among rejected candidates.
        first: score by name of every evaluated candidate on the questions that all of its iteration answered, from
            which the worst are taken: leaving a race early does not say who is worst. Without it, `scores`.

    Returns:
        At most `settings.pairs` pairs, the chosen side in turns so that none stands in many more pairs than
        another; none where there is nobody to choose or nobody to reject.
    """
    written = [c for c in candidates if c.iteration == iteration]
    first = scores if first is None else first
    ranked = _ranked(written, scores)
    best = max(settings.chosen_floor, math.ceil(settings.chosen_share * len(written)))
    chosen = ranked[:best] + _elites(candidates, scores, iteration, settings.elites)
    worst = max(settings.rejected_floor, math.ceil(settings.rejected_share * len(written)))
    others = [c for c in _ranked(written, first) if c not in ranked[:best]]
    pools = {"score": others[-worst:]}
    if settings.copies_as_rejected:
        pools["copy"] = [c for c in written if c.status in ("trivial", "known", "repeated")]
    if settings.failures_as_rejected:
        pools["failure"] = [c for c in written if c.status == "failed"]
    return _pair_up(chosen, pools, scores, first, settings, random.Random(seed))


def _ranked(candidates: Sequence[Candidate], scores: Mapping[str, float]) -> list[Candidate]:
    """New candidates, best score first; equal scores in the order in which they were written."""
    new = [c for c in candidates if c.status == "new" and c.name in scores]
    return sorted(new, key=lambda c: -scores[c.name])


def _elites(
    candidates: Sequence[Candidate], scores: Mapping[str, float], iteration: int, count: int
) -> list[Candidate]:
    earlier = [[c for c in candidates if c.iteration == t] for t in range(iteration)]
    return [elite for written in earlier for elite in _ranked(written, scores)[:count]]


def _pair_up(
    chosen: Sequence[Candidate],
    pools: Mapping[str, Sequence[Candidate]],
    scores: Mapping[str, float],
    first: Mapping[str, float],
    settings: Preferences,
    draw: random.Random,
) -> list[Pair]:
    """Deal the rejected out as shuffled decks, one a reason; each gets the partner with the fewest pairs so far."""
    decks = {reason: draw.sample(list(pool), len(pool)) for reason, pool in pools.items() if pool}
    # Beyond a share of pairs against failing programs a weak model learns only not to crash.
    failing = int(settings.failing_cap * settings.pairs) if "failure" in decks else 0
    working = [reason for reason in decks if reason != "failure"]
    wanted = dict.fromkeys(working, 0) | ({"failure": failing} if failing else {})
    for number in range(settings.pairs - failing if working else 0):
        wanted[working[number % len(working)]] += 1
    # The reasons in turn: where `pairs_each` ends the deal early, none of them is left out.
    turns = sorted((turn / count, reason) for reason, count in wanted.items() for turn in range(1, count + 1))
    pairs: dict[tuple[str, str], Pair] = {}
    uses = dict.fromkeys([c.name for c in chosen], 0)
    for _, reason in turns:
        deck = decks[reason]
        for _ in range(len(deck)):
            deck.append(rejected := deck.pop(0))
            free = [name for name, used in uses.items() if used < settings.pairs_each]
            better = (c for c in free if reason != "score" or scores[c] > first[rejected.name])
            partner = min(_partners(better, rejected, pairs), key=uses.__getitem__, default=None)
            if partner is not None:
                pairs[partner, rejected.name] = Pair(partner, rejected.name, reason)
                uses[partner] += 1
                break
    return list(pairs.values())


def _partners(chosen: Iterable[str], rejected: Candidate, pairs: Mapping[tuple[str, str], Pair]) -> list[str]:
    """Who may be preferred to the rejected program: not itself or what it copies, and nobody twice."""
    copied = rejected.nearest if rejected.status == "repeated" else None
    return [
        name for name in chosen if name not in (rejected.name, copied) and (name, rejected.name) not in pairs
    ]
