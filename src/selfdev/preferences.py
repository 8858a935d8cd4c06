"""From scores to preference pairs.

The best new programs of an iteration are *chosen*, and the elites of earlier iterations with them; with
`preferences.evidence`, only those that are surely better than the seed. *Rejected* are, as the settings say: the worst
new programs by score; programs that work but invent nothing (trivial, known, repeated); programs that fail. Only new
programs are ever chosen, whatever a trivial one scores.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property

import torch

from selfdev.algorithms.screening import TOLERANCE, Behaviour
from selfdev.archive import Candidate, Pair
from selfdev.settings import Preferences

Better = Callable[[str, str | None], bool]

FAILING = ("repair", "failure")
"""Reasons of pairs whose rejected program fails."""


_DECK = 1000
"""Programs of a reason that are dealt at the most, drawn from all: each text is compared with the others."""


def asked(pair: Pair) -> str:
    """The program under whose prompt a pair is trained: a copy's own, where the example stands that it copies."""
    return pair.rejected if pair.reason == "copy" else pair.chosen


def prefer(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    iteration: int,
    settings: Preferences,
    seed: int,
    first: Mapping[str, float] | None = None,
    better: Better = lambda name, other: True,
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
        better: whether the first program is surely better than the second, or than the seed for None.

    Returns:
        At most `settings.pairs` pairs, the chosen side in turns so that none stands in many more pairs than
        another; none where there is nobody to choose or nobody to reject.
    """
    written = [c for c in candidates if c.iteration == iteration]
    first = scores if first is None else first
    ranked = _ranked(written, scores)
    best = max(settings.chosen_floor, math.ceil(settings.chosen_share * len(written)))
    top = [c for c in ranked if better(c.name, None)][:best]
    elites = _elites(candidates, scores, iteration, settings.elites)
    chosen = top + [c for c in elites if better(c.name, None)]
    worst = max(settings.rejected_floor, math.ceil(settings.rejected_share * len(written)))
    others = [c for c in _ranked(written, first) if c not in top]
    pools = {"score": others[-worst:]}
    if settings.copies_as_rejected:
        pools["copy"] = [c for c in written if c.status in ("trivial", "known", "repeated")]
    if settings.failures_as_rejected:
        # An answer without a token, as a server's that was cut off, is nothing to learn from.
        pools["failure"] = [c for c in written if c.status == "failed" and c.tokens]
    return _pair_up(chosen, pools, scores, first, better, settings, random.Random(seed))


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
    better: Better,
    settings: Preferences,
    draw: random.Random,
) -> list[Pair]:
    """Deal the rejected out, with as many failing ones as the cap allows beside the others that find a partner."""
    decks = {reason: _deck(pool, settings.alike, draw) for reason, pool in pools.items() if pool}
    deal = _Deal(chosen, decks, scores, first, better, settings)
    # Beyond a share of pairs against failing programs a weak model learns only not to crash. A cap above a half leaves
    # the other reasons theirs, where there are any.
    most = min(settings.failing_cap, 0.5) if decks.keys() - {"failure"} else settings.failing_cap
    failing = int(most * settings.pairs) if "failure" in decks else 0
    while True:
        pairs = deal.pairs(failing)
        if within_cap(pairs, settings.failing_cap) == pairs:
            return pairs
        # One less, and who was chosen beside it is free for others.
        failing = min(failing, sum(pair.reason in FAILING for pair in pairs)) - 1


@dataclass(frozen=True)
class _Deal:
    """Who is dealt out to whom; decks by the reason for which they are rejected. For the others see `prefer`."""

    chosen: Sequence[Candidate]
    decks: Mapping[str, Sequence[Candidate]]
    scores: Mapping[str, float]
    first: Mapping[str, float]
    better: Better
    settings: Preferences

    @cached_property
    def family(self) -> dict[str, str]:
        """Of each chosen program, whose variation it is."""
        return _families(self.chosen, self.settings.alike)

    @cached_property
    def alike(self) -> dict[str, set[str]]:
        """Who does what each rejected program does."""
        return _of_one_behaviour([c for deck in self.decks.values() for c in deck], self.chosen)

    def pairs(self, failing: int) -> list[Pair]:
        """Deal the failing ones out so many times, and the others for the rest of the pairs.

        Each gets the partner with the fewest pairs so far.
        """
        left = {reason: list(deck) for reason, deck in self.decks.items()}
        pairs: dict[tuple[str, str], Pair] = {}
        told: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        uses = dict.fromkeys(self.family.values(), 0)
        for reason in self._turns(failing):
            deck = left[reason]
            for _ in range(len(deck)):
                deck.append(rejected := deck.pop(0))
                free = [
                    c
                    for c in self.chosen
                    if uses[self.family[c.name]] < self.settings.pairs_each
                    and (c.name, rejected.name) not in pairs
                    # Copies have names of their own: two texts against each other would teach nothing.
                    and (not rejected.tokens or (rejected.tokens, c.tokens) not in told)
                    and self._preferable(c, rejected, reason)
                ]
                partner = min(free, key=lambda c: uses[self.family[c.name]], default=None)
                if partner is not None:
                    pairs[partner.name, rejected.name] = Pair(partner.name, rejected.name, reason)
                    told.add((partner.tokens, rejected.tokens))
                    uses[self.family[partner.name]] += 1
                    break
        return list(pairs.values())

    def _turns(self, failing: int) -> list[str]:
        """The reasons in turn: where `pairs_each` ends the deal early, none of them is left out."""
        working = [reason for reason in self.decks if reason != "failure"]
        wanted = dict.fromkeys(working, 0) | ({"failure": failing} if failing else {})
        for number in range(self.settings.pairs - failing if working else 0):
            wanted[working[number % len(working)]] += 1
        turns = sorted((turn / n, reason) for reason, n in wanted.items() for turn in range(1, n + 1))
        return [reason for _, reason in turns]

    def _preferable(self, chosen: Candidate, rejected: Candidate, reason: str) -> bool:
        """Whether two programs could be a pair at all."""
        if chosen.name in self.alike[rejected.name] or (rejected.tokens and chosen.tokens == rejected.tokens):
            return False
        if reason != "score":
            return True
        # Who could be chosen is compared in all answers; who left early or broke a floor, in what all have.
        theirs = self.scores.get(rejected.name, self.first[rejected.name])
        return self.scores[chosen.name] > theirs and self.better(chosen.name, rejected.name)


def within_cap(pairs: Sequence[Pair], cap: float) -> list[Pair]:
    """Leave out pairs whose rejected side fails until they are at most this share of all; the last ones first."""
    failing = [pair for pair in pairs if pair.reason in FAILING]
    kept, others = len(failing), len(pairs) - len(failing)
    while kept > cap * (kept + others):
        kept -= 1
    dropped = failing[kept:]
    return [pair for pair in pairs if pair not in dropped]


def _deck(pool: Sequence[Candidate], alike: float, draw: random.Random) -> list[Candidate]:
    """Shuffled, with classes in turn, and variations on one text behind what none of them has been dealt of.

    A class is why a program fails, or whether it is trivial, known or repeated. Without that a factory that mostly
    forgets a bracket would be told of little else.
    """
    shuffled = draw.sample(list(pool), min(len(pool), _DECK))
    family = _families(shuffled, alike)
    mixed = _in_turns(shuffled, lambda c: family[c.name])
    return _in_turns(mixed, lambda c: (c.status, c.failure))


def _in_turns(candidates: Sequence[Candidate], group: Callable[[Candidate], object]) -> list[Candidate]:
    """The first of every group, the second of every group, and so on; otherwise in the order given."""
    seen: Counter[object] = Counter()
    turns = []
    for candidate in candidates:
        turns.append(seen[group(candidate)])
        seen[group(candidate)] += 1
    return [c for _, c in sorted(zip(turns, candidates, strict=True), key=lambda both: both[0])]


def _families(candidates: Sequence[Candidate], alike: float) -> dict[str, str]:
    """The first of the programs that each one's text is like: variations on one count as one."""
    if alike == 1:  # no text is more alike than that
        return {c.name: c.name for c in candidates}
    family: dict[str, str] = {}
    heads: list[Candidate] = []
    matcher = SequenceMatcher[int](None, (), (), autojunk=False)
    for candidate in candidates:
        matcher.set_seq2(candidate.tokens)
        for head in heads:
            matcher.set_seq1(head.tokens)
            # Bounds first, the cheapest first: nearly all pairs end there.
            if all(
                bound() > alike for bound in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
            ):
                family[candidate.name] = head.name
                break
        else:
            heads.append(candidate)
            family[candidate.name] = candidate.name
    return family


def _of_one_behaviour(rejected: Sequence[Candidate], chosen: Sequence[Candidate]) -> dict[str, set[str]]:
    """Who may not be preferred to each, since it does the same: itself, what it repeats, and what is as near."""
    alike = {c.name: {c.name, (c.status == "repeated" and c.nearest) or c.name} for c in rejected}
    known = {c.name: Behaviour.from_bytes(c.behaviour).entries for c in chosen if c.behaviour is not None}
    if known:
        others = torch.stack(list(known.values()))
        for c in rejected:
            if c.behaviour is not None:
                distances = Behaviour.from_bytes(c.behaviour).distances(others).tolist()
                alike[c.name] |= {
                    name for name, far in zip(known, distances, strict=True) if far <= TOLERANCE
                }
    return alike
