"""From scores to preference pairs.

The best new programs of an iteration are *chosen*, and the elites of earlier iterations with them. *Rejected* are,
as the settings say: the worst new programs by score; programs that work but invent nothing (trivial, known,
repeated); programs that fail. Only new programs are ever chosen, whatever a trivial one scores.
"""

import math
import random
from collections.abc import Mapping, Sequence

from selfdev.archive import Candidate, Pair
from selfdev.config import Preferences


def prefer(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    iteration: int,
    settings: Preferences,
    seed: int,
) -> list[Pair]:
    """Make the pairs of one iteration of one arm.

    Args:
        candidates: of the arm, up to and with this iteration, all screened.
        scores: development score of each evaluated candidate by name, in 0..1.
        iteration: the one that has just been evaluated, from 0.
        settings: shares, floors and caps.
        seed: of the draw among rejected candidates.

    Returns:
        At most `settings.pairs` pairs, the chosen side in turns so that none stands in many more pairs than
        another; none where there is nobody to choose or nobody to reject.
    """
    written = [c for c in candidates if c.iteration == iteration]
    ranked = _ranked(written, scores)
    best = max(settings.chosen_floor, math.ceil(settings.chosen_share * len(written)))
    chosen = ranked[:best] + _elites(candidates, scores, iteration, settings.elites)
    worst = max(settings.rejected_floor, math.ceil(settings.rejected_share * len(written)))
    pools = {"score": ranked[best:][-worst:]}
    if settings.copies_as_rejected:
        pools["copy"] = [c for c in written if c.status in ("trivial", "known", "repeated")]
    if settings.failures_as_rejected:
        pools["failure"] = [c for c in written if c.status == "failed"]
    return _pair_up(chosen, pools, settings, random.Random(seed))


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
    settings: Preferences,
    draw: random.Random,
) -> list[Pair]:
    if not chosen:
        return []
    # Every pool is dealt out as a shuffled deck: nobody is rejected twice before all have been once.
    decks = {reason: draw.sample(list(pool), len(pool)) for reason, pool in pools.items() if pool}
    most = {reason: settings.pairs for reason in decks}
    if "failure" in most:
        # Beyond a share of such pairs a weak model learns only not to crash.
        most["failure"] = int(settings.failing_cap * settings.pairs)
    if "copy" in most:
        most["copy"] = min(settings.pairs, 2 * len(pools["copy"]))
    pairs: list[Pair] = []
    turn = 0
    while len(pairs) < settings.pairs and any(most.values()):
        reason = max(most, key=lambda r: most[r] / settings.pairs)
        most[reason] -= 1
        deck = decks[reason]
        rejected = deck.pop(0)
        deck.append(rejected)
        partners = [chosen[(turn + i) % len(chosen)] for i in range(len(chosen))]
        # A copy of the chosen program itself is no worse than it: such a pair would teach nothing.
        partner = next((c for c in partners if rejected.nearest != c.name and c.name != rejected.name), None)
        if partner is not None:
            pairs.append(Pair(partner.name, rejected.name, reason))
            turn += 1
    return pairs
