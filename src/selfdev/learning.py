"""An arm's factory: what it is asked, and one round of learning, with what is repaired, preferred and imitated.

Every step asks the archive first whether it is done, as in the cycle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfdev.algorithms.examples import examples
from selfdev.algorithms.repair import repair
from selfdev.algorithms.source import rewrite
from selfdev.archive import Archive, Candidate, Pair, Refinement
from selfdev.candidates import candidate_name, history_of, screened
from selfdev.config import Config
from selfdev.errors import UserError
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.standing import COMBINED, FEEDBACK, LEARNING, ranked_new, repairs_of, scores_on_first
from selfdev.factory.prompt import Prompt, base_of, showing
from selfdev.factory.taught import Taught
from selfdev.models.folder import weights_hash
from selfdev.preferences import asked, prefer, within_cap
from selfdev.roles import Factory, Screener
from selfdev.streams import stream_seed
from selfdev.watcher import Watcher

_NONE_GOOD = "no program is good enough to be preferred or imitated"
_NO_PAIR = (
    "of what is good enough to be preferred no pair is made: there is nothing to reject beside repetitions of it, what "
    "preferences.chosen_floor counts among the best, what is not surely worse and, beyond preferences.failing_cap, "
    "failures"
)


@dataclass(frozen=True)
class Learning:
    """What an arm's factory is asked, how it is trained, and what it has been trained with."""

    arm: str
    config: Config
    archive: Archive
    factory: Factory
    screen: Screener
    watch: Watcher
    folder: Path

    @property
    def learns(self) -> bool:
        """Whether the arm's factory is trained at all."""
        return self.arm in (LEARNING, COMBINED) and self.config.refinement.refit != "never"

    def prompts(self, t: int) -> list[Prompt]:
        """What the arm's factory is asked in iteration t; afterwards, what it was asked."""
        prompts = self.factory.prompts(t)
        shows = self.arm in (FEEDBACK, COMBINED) or (self.arm == LEARNING and self.config.prompt.feedback)
        if not shows:
            return prompts
        earlier = [c for c, _ in ranked_new(self.archive, self.arm, tuned=False) if c.iteration < t]
        best = {c.name: c.source or "" for c in earlier[: self.config.prompt.elites]}
        return showing(prompts, best, examples())

    def _asked(self, t: int) -> list[Prompt]:
        """What it was asked in iteration t, its repair turn too, as `Candidate.prompt` counts it."""
        [written] = [each for each in self.archive.iterations(self.arm) if each.iteration == t]
        prompts, texts = self.prompts(t), written.prompts
        return [replace(prompts[base_of(text, texts)], text=text) for text in texts]

    def learn(self, t: int) -> None:
        """Make the pairs of iteration t and refine the arm's factory with them."""
        if self.archive.refinement(self.arm, t) is not None:
            return
        candidates = [c for c in self.archive.candidates(self.arm) if c.iteration <= t]
        repaired = self.archive.candidates(repairs_of(self.arm))
        evidence = Evidence(self.archive, self.config.preferences.evidence)
        if self.config.preferences.score_repairs:
            repaired = [c for c in repaired if c.status == "new" and evidence.better(c.name)]
        if not self.archive.pairs(self.arm, t):
            self.archive.add_pairs(self.arm, t, self._pairs(t, candidates, repaired, evidence))
        good = [c for c in candidates if c.status == "new" and evidence.better(c.name)]
        taught = self._taught(t, candidates, good, repaired, evidence)
        with self.watch.phase("refine", self.arm, t) as tick:
            if taught.pairs or taught.imitated:
                adapter = f"adapters/{self.arm}-{t + 1}"
                facts = self.factory.refine(taught, t, self.adapters(), self.folder / adapter, tick)
                made = Refinement(self.arm, t, adapter, facts, 0.0)
            else:
                made = Refinement(
                    self.arm, t, None, {"skipped": _NO_PAIR if good or repaired else _NONE_GOOD}, 0.0
                )
            if made.why_nothing is not None:
                made = replace(made, adapter=None)
                tick(1, 1, f"nothing learned: {made.why_nothing}")
        self.archive.add_refinement(replace(made, seconds=tick.seconds))

    def _taught(
        self,
        t: int,
        candidates: Sequence[Candidate],
        good: Sequence[Candidate],
        repaired: Sequence[Candidate],
        evidence: Evidence,
    ) -> Taught:
        """The pairs and the programs of the rounds that iteration t learns from, under their own prompts."""
        rounds = range(t + 1) if self.config.refinement.refit == "fresh" else [t]
        named = [pair for round_ in rounds for pair in self.archive.pairs(self.arm, round_)]
        prompts = [self._asked(round_) for round_ in range(t + 1)]
        written = {c.name: c for c in (*candidates, *repaired)}

        def under(name: str) -> Prompt:
            return prompts[written[name].iteration][written[name].prompt]

        def tokens(name: str) -> tuple[int, ...]:
            return written[name].tokens

        pairs = [(under(asked(pair)), tokens(pair.chosen), tokens(pair.rejected)) for pair in named]
        imitated = [c.name for c in (*good, *repaired) if c.iteration in rounds]
        if not self.config.refinement.imitation.passes:
            imitated = []
        # What fails or copies is rejected for that: no answer can turn such a pair round.
        doubts = [evidence.doubt(p.chosen, p.rejected) if p.reason == "score" else 0.0 for p in named]
        return Taught(
            pairs, [(under(name), tokens(name)) for name in imitated], sum(doubts) / max(1, len(doubts))
        )

    def _pairs(
        self, t: int, candidates: Sequence[Candidate], repaired: Sequence[Candidate], evidence: Evidence
    ) -> list[Pair]:
        """The pairs of iteration t; repairs are among them where they are not imitated anyway."""
        scores = {c.name: e.score for c, e in ranked_new(self.archive, self.arm) if e.score is not None}
        first = scores_on_first(self.archive)
        seed = stream_seed(self.config.seed, "pairs", t)
        pairs = prefer(candidates, scores, t, self.config.preferences, seed, first, evidence.better)
        if self.config.refinement.imitation.passes:
            return pairs
        mended = [c for c in repaired if c.iteration == t]
        repairs = [Pair(c.name, candidate_name(self.arm, t, c.number), "repair") for c in mended]
        return within_cap(repairs + pairs, self.config.preferences.failing_cap)

    def repair(self, t: int) -> None:
        """Archive the working neighbours of the arm's failing programs of iteration t."""
        tries = self.config.preferences.repairs
        if tries == 0 or self.archive.iteration(repairs_of(self.arm), t) is not None:
            return
        [written] = [each for each in self.archive.iterations(self.arm) if each.iteration == t]
        failing = [c for c in self.archive.candidates(self.arm, t) if c.status == "failed" and c.source]
        history = history_of(self.archive, self.arm)
        repaired: list[Candidate] = []
        with self.watch.phase("repair", self.arm, t) as tick:
            for done, candidate in enumerate(failing):
                tick(done, len(failing), f"{len(repaired)} repaired")
                found = repair(candidate.source or "", self.screen, history, tries)
                if found is not None:
                    text = rewrite(candidate.text, self.config.prompt.form, found[0])
                    name = candidate_name(repairs_of(self.arm), t, candidate.number)
                    neighbour = replace(
                        candidate,
                        name=name,
                        arm=repairs_of(self.arm),
                        text=text,
                        tokens=self.factory.tokens(text),
                        log_prob=None,
                        log_probs=None,
                        seconds=None,
                        finished=True,
                        source=found[0],
                    )
                    repaired.append(screened(neighbour, found[1]))
                    history.add(name, found[1])
            tick(len(failing), len(failing), f"{len(repaired)} repaired")
        self.archive.add_written(replace(written, arm=repairs_of(self.arm), seconds=tick.seconds), repaired)

    def adapters(self, before: int | None = None) -> list[Path]:
        """What the factory has learned (until iteration `before`, by default now): adapters in the order of merging.

        Raises:
            UserError: one is not what was saved.
        """
        rounds = [r for r in self.archive.refinements(self.arm) if before is None or r.iteration < before]
        rounds = [r for r in rounds if r.adapter is not None]
        if self.config.refinement.last_is_all:
            rounds = rounds[-1:]
        folders = [self.folder / str(r.adapter) for r in rounds]
        for folder, round_ in zip(folders, rounds, strict=True):
            if (saved := round_.facts.get("adapter")) is not None:
                _check_saved(folder, saved)
        return folders


def _check_saved(folder: Path, saved: str) -> None:
    """What is merged must be what was learned."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"'{folder}', which the run has learned, is not there; put it back, or begin the run anew"
        )
    if weights_hash(folder) != saved:
        raise UserError(
            f"'{folder}' is not what the run has learned, by its hash; put that back, or begin the run anew"
        )
