"""The Self-Developing cycle (Ishibashi et al. 2025, arXiv 2410.15639).

Every step asks the archive first whether it is done, so the same code begins a run and resumes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from selfdev.algorithms.examples import examples
from selfdev.algorithms.repair import repair
from selfdev.algorithms.screening import Behaviour, History, Novelty, Screening
from selfdev.algorithms.source import Form, Unreadable, read_program, rewrite
from selfdev.archive import Archive, Candidate, Evaluation, Iteration, Pair, Refinement
from selfdev.config import Config
from selfdev.evaluation.course import Course
from selfdev.evaluation.evaluator import Refused, Scorer, score_again
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.rivals import best_rival, settings_to_try
from selfdev.evaluation.standing import FEEDBACK, LEARNING, NORMED, REPAIRED, ranked_new, scores_on_first
from selfdev.evaluation.verdict import reach_verdict
from selfdev.factory.prompt import Prompt, showing
from selfdev.factory.sampling import Sample
from selfdev.preferences import asked, prefer
from selfdev.streams import stream_seed
from selfdev.watcher import Watcher


class Factory(Protocol):
    """Who writes and learns; `selfdev.factory.factory.LocalFactory`, or a scripted one in a test."""

    @property
    def facts(self) -> dict[str, Any]: ...
    def prepare(self, tick: Any) -> None: ...
    def prompts(self, iteration: int) -> list[Prompt]: ...
    def write(
        self,
        prompts: Sequence[Prompt],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Any,
    ) -> list[tuple[int, Sample]]: ...
    def tokens(self, text: str) -> tuple[int, ...]: ...
    def refine(
        self,
        pairs: Sequence[tuple[Prompt, tuple[int, ...], tuple[int, ...]]],
        iteration: int,
        adapters: Sequence[Path],
        out: Path,
        tick: Any,
        flip_rate: float = 0.0,
        imitated: Sequence[tuple[Prompt, tuple[int, ...]]] = (),
    ) -> dict[str, Any]: ...


class Screener(Protocol):
    """Does a program run, and is it new? `selfdev.algorithms.screening.Screen`."""

    def __call__(self, source: str, history: History) -> Screening: ...


@dataclass(frozen=True)
class Cycle:
    """Everything that the cycle works with, passed in."""

    config: Config
    archive: Archive
    factory: Factory
    screen: Screener
    scorer: Scorer
    watch: Watcher
    folder: Path

    def run(self) -> None:
        """Run to the verdict, from wherever the archive stands."""
        if self.archive.run.status == "running":
            self._begin()
            for t in range(self.config.iterations):
                for arm in (LEARNING, *self.config.controls):
                    self._write(arm, t)
                    self._judge(arm, t)
                self._tune_rivals()
                if t + 1 < self.config.iterations and self.config.refinement.refit != "never":
                    self._learn(t)
            for arm in (LEARNING, *self.config.controls):
                self._tune_scales(arm)
            self._tune_rivals()
        if self.archive.run.status != "done":
            with self.watch.phase("verdict") as tick:
                reach_verdict(
                    self.archive, self.config, self.scorer, lambda done, total: tick(done, total, "")
                )

    def _begin(self) -> None:
        questions = self.scorer.questions("development")
        self.archive.set_questions("development", [(q.id, q.group) for q in questions])
        if not self.archive.evaluations("seed"):
            self.archive.add_evaluation(self.scorer.seed("development"))

    def _write(self, arm: str, t: int) -> None:
        """The arm's factory writes its programs of iteration t, at this iteration's temperature."""
        if any(done.iteration == t for done in self.archive.iterations(arm)):
            return
        temperature = self.config.factory.temperature_at(t)
        adapters = self._adapters(arm)
        with self.watch.phase("write", arm, t) as tick:
            prompts = self._prompts(arm, t)
            texts = tuple(prompt.text for prompt in prompts)
            twin = self._same_factory(arm, t, adapters, texts)
            if twin is not None:
                iteration, written = twin
                written = [replace(c, name=_name(arm, t, c.number), arm=arm) for c in written]
                self.archive.add_written(replace(iteration, arm=arm), written)
                return
            samples = self.factory.write(prompts, t, temperature, adapters, tick)
        form = self.config.prompt.form
        written = [
            _read(arm, t, number, prompt, sample, form) for number, (prompt, sample) in enumerate(samples)
        ]
        self.archive.add_written(Iteration(arm, t, temperature, texts, tick.seconds), written)

    def _prompts(self, arm: str, t: int) -> list[Prompt]:
        """What the arm's factory is asked in iteration t."""
        prompts = self.factory.prompts(t)
        if arm != FEEDBACK:
            return prompts
        earlier = [c for c, _ in ranked_new(self.archive, arm, tuned=False) if c.iteration < t]
        best = {c.name: c.source or "" for c in earlier[: len(prompts)]}
        return showing(prompts, best, examples())

    def _same_factory(
        self, arm: str, t: int, adapters: Sequence[Path], prompts: tuple[str, ...]
    ) -> tuple[Iteration, list[Candidate]] | None:
        """What another arm's equal factory wrote in this iteration: the same streams make it the same text."""
        for other in self.archive.iterations():
            if (
                other.arm != REPAIRED
                and other.iteration == t
                and other.arm != arm
                and other.prompts == prompts
                and not adapters
                and not self._adapters(other.arm, t)
            ):
                candidates = self.archive.candidates(other.arm, t)
                return other, [_unscreened(c) for c in candidates]
        return None

    def _judge(self, arm: str, t: int) -> None:
        """Screen every program, and score on development those that are new."""
        course = Course(self.archive, self.config, arm, t)
        with self.watch.phase("judge", arm, t) as tick:
            history = self._history(arm)
            candidates = self.archive.candidates(arm, t)
            for done, candidate in enumerate(candidates):
                tick(done, len(candidates), "")
                if candidate.status is None:
                    candidate, evaluation = self._judged(candidate, history, course)
                    # What a race has not compared yet leads nothing.
                    self.watch.screened(candidate, evaluation if self.config.race is None else None)
            finished = course.finish(self.scorer, lambda note: tick(len(candidates), len(candidates), note))
            for evaluation in finished:
                self.watch.scored(evaluation)
            tick(len(candidates), len(candidates), "")
        norm = self.config.scaling.norm
        if norm is not None:
            finishers = {evaluation.subject for evaluation in finished}
            scales = [(c, NORMED, 1.0, norm) for c in self.archive.candidates(arm, t) if c.name in finishers]
            self._try_scales("scale", scales, arm, t)

    def _history(self, arm: str) -> History:
        """What the arm's programs may not repeat: what it wrote, and what it was taught of repairs."""
        history = History()
        taught = self.archive.candidates(REPAIRED) if arm == LEARNING else []
        for earlier in self.archive.candidates(arm) + taught:
            _remember(history, earlier)
        return history

    def _judged(
        self, candidate: Candidate, history: History, course: Course
    ) -> tuple[Candidate, Evaluation | None]:
        found = self.screen(candidate.source or "", history)
        candidate = _screened(candidate, found)
        evaluation = None
        if found.novelty is Novelty.NEW:
            try:
                evaluation = course.start(self.scorer, candidate)
            except Refused as refused:
                candidate = replace(
                    candidate, status=refused.status, failure=refused.failure or None, error=refused.error
                )
        if evaluation is not None and evaluation.failure is not None:
            candidate = replace(candidate, status="failed", failure="ScoringError", error=evaluation.failure)
        self.archive.set_screened(candidate, evaluation)
        _remember(history, candidate)
        return candidate, evaluation

    def _tune_scales(self, arm: str) -> None:
        """Try the best programs of an arm at other scales: a constant is the least of what they invent."""
        settings = self.config.scaling
        best = ranked_new(self.archive, arm, tuned=False)[: settings.programs]
        scales = [
            (candidate, number, so_far.factor * factor, None)
            for candidate, so_far in best
            for number, factor in enumerate(settings.factors, start=NORMED + 1)
        ]
        self._try_scales("tune", scales, arm)

    def _try_scales(
        self,
        phase: str,
        scales: Sequence[tuple[Candidate, int, float, float | None]],
        arm: str,
        t: int | None = None,
    ) -> None:
        """Score programs at scales that are not archived yet: candidate, number, factor, norm."""
        known = {(e.subject, e.number) for e in self.archive.evaluations("scaled")}
        with self.watch.phase(phase, arm, t) as tick:
            for done, (candidate, number, factor, norm) in enumerate(scales):
                tick(done, len(scales), candidate.name)
                if (candidate.name, number) not in known:
                    scaled = score_again(self.scorer, candidate, "development", number, factor, norm)
                    self.archive.add_evaluation(scaled)
                    self.watch.scored(scaled)
            tick(len(scales), len(scales), "")

    def _tune_rivals(self) -> None:
        """Give every rival as many evaluations as the learning arm has spent on candidates so far."""
        evaluations = self.archive.evaluations("candidate") + self.archive.evaluations("scaled")
        spent = [e for e in evaluations if e.subject.startswith(f"{LEARNING}/")]
        experts = len(self.config.merge.experts)
        with self.watch.phase("rivals") as tick:
            for index, name in enumerate(self.config.rivals):
                known = {e.number for e in self.archive.evaluations("rival", name)}
                for number, parameters in settings_to_try(name, len(spent), experts, self.config.seed):
                    if number not in known:
                        tick(index * len(spent) + number, len(spent) * len(self.config.rivals), name)
                        self.archive.add_evaluation(
                            self.scorer.rival(name, number, parameters, "development")
                        )
                self.watch.rival(best_rival(self.archive))

    def _learn(self, t: int) -> None:
        """Make the pairs of iteration t and refine the learning arm's factory with them."""
        if any(done.iteration == t for done in self.archive.refinements(LEARNING)):
            return
        self._repair(t)
        candidates = [c for c in self.archive.candidates(LEARNING) if c.iteration <= t]
        repaired = self.archive.candidates(REPAIRED)
        settings = self.config.preferences
        evidence = Evidence(self.archive, settings.evidence)
        better = evidence.better
        if not self.archive.pairs(LEARNING, t):
            scores = {c.name: e.score for c, e in ranked_new(self.archive, LEARNING) if e.score is not None}
            first = scores_on_first(self.archive)
            seed = stream_seed(self.config.seed, "pairs", t)
            preferred = prefer(candidates, scores, t, settings, seed, first, better)
            repairs = [
                Pair(c.name, _name(LEARNING, t, c.number), "repair") for c in repaired if c.iteration == t
            ]
            paired = [] if self.config.refinement.imitation.passes else repairs
            self.archive.add_pairs(LEARNING, t, preferred + paired)
        fresh = self.config.refinement.refit == "fresh"
        rounds = range(t + 1) if fresh else [t]
        named = [pair for round_ in rounds for pair in self.archive.pairs(LEARNING, round_)]
        good = [c for c in candidates if c.status == "new" and better(c.name, None)] + repaired
        good = [c for c in good if c.iteration in rounds]
        if not named and not (good and self.config.refinement.imitation.passes):
            why = "nothing to prefer: no new program, or none to reject"
            self.archive.add_refinement(Refinement(LEARNING, t, None, {"skipped": why}, 0.0))
            return
        prompts = [self.factory.prompts(round_) for round_ in range(t + 1)]
        prompt = {c.name: prompts[c.iteration][c.prompt] for c in candidates + repaired}
        tokens = {c.name: c.tokens for c in candidates + repaired}
        pairs = [(prompt[asked(pair)], tokens[pair.chosen], tokens[pair.rejected]) for pair in named]
        imitated = [(prompt[c.name], c.tokens) for c in good]
        adapter = f"adapters/{LEARNING}-{t + 1}"
        # What fails or copies is rejected for that: no answer can turn such a pair round.
        doubts = [evidence.doubt(p.chosen, p.rejected) if p.reason == "score" else 0.0 for p in named]
        flip_rate = sum(doubts) / max(1, len(doubts))
        with self.watch.phase("refine", LEARNING, t) as tick:
            facts = self.factory.refine(
                pairs, t, self._adapters(LEARNING), self.folder / adapter, tick, flip_rate, imitated
            )
        kept = None if {"skipped", "rolled_back"} & facts.keys() else adapter
        self.archive.add_refinement(Refinement(LEARNING, t, kept, facts, tick.seconds))

    def _repair(self, t: int) -> None:
        """Archive the working neighbours of the learning arm's failing programs of iteration t."""
        tries = self.config.preferences.repairs
        if tries == 0 or any(done.iteration == t for done in self.archive.iterations(REPAIRED)):
            return
        [written] = [each for each in self.archive.iterations(LEARNING) if each.iteration == t]
        failing = [c for c in self.archive.candidates(LEARNING, t) if c.status == "failed" and c.source]
        history = self._history(LEARNING)
        repaired: list[Candidate] = []
        with self.watch.phase("repair", LEARNING, t) as tick:
            for done, candidate in enumerate(failing):
                tick(done, len(failing), f"{len(repaired)} repaired")
                found = repair(candidate.source or "", self.screen, history, tries)
                if found is not None:
                    text = rewrite(candidate.text, self.config.prompt.form, found[0])
                    name = _name(REPAIRED, t, candidate.number)
                    neighbour = replace(
                        candidate,
                        name=name,
                        arm=REPAIRED,
                        text=text,
                        tokens=self.factory.tokens(text),
                        log_prob=None,
                        finished=True,
                        source=found[0],
                    )
                    repaired.append(_screened(neighbour, found[1]))
                    history.add(name, found[1])
            tick(len(failing), len(failing), f"{len(repaired)} repaired")
        self.archive.add_written(replace(written, arm=REPAIRED, seconds=tick.seconds), repaired)

    def _adapters(self, arm: str, before: int | None = None) -> list[Path]:
        """The adapters of an arm's factory (of iteration `before`, by default now), in the order they are merged in."""
        rounds = [r for r in self.archive.refinements(arm) if before is None or r.iteration < before]
        folders = [self.folder / r.adapter for r in rounds if r.adapter is not None]
        return folders[-1:] if self.config.refinement.refit == "fresh" else folders


def _name(arm: str, t: int, number: int) -> str:
    return f"{arm}/{t + 1}/{number + 1:03d}"


def _read(arm: str, t: int, number: int, prompt: int, sample: Sample, form: Form) -> Candidate:
    candidate = Candidate(
        _name(arm, t, number),
        arm,
        t,
        number,
        prompt,
        sample.text,
        sample.tokens,
        sample.log_prob,
        sample.finished,
    )
    try:
        return replace(candidate, source=read_program(sample.text, form))
    except Unreadable as error:
        return replace(candidate, status="failed", failure="NoFunction", error=str(error))


def _screened(candidate: Candidate, found: Screening) -> Candidate:
    return replace(
        candidate,
        status="failed" if found.novelty is None else str(found.novelty),
        failure=found.failure or None,
        error=found.error or None,
        canonical=found.canonical or None,
        behaviour=None if found.behaviour is None else found.behaviour.to_bytes(),
        nearest=found.nearest or None,
        distance=found.distance,
    )


def _unscreened(candidate: Candidate) -> Candidate:
    if candidate.source is None:
        return candidate
    return replace(
        candidate,
        status=None,
        failure=None,
        error=None,
        canonical=None,
        behaviour=None,
        nearest=None,
        distance=None,
    )


def _remember(history: History, candidate: Candidate) -> None:
    """Add a program to its arm's history, as the archive knows it; one that failed may be tried again."""
    if candidate.works and candidate.behaviour is not None:
        found = Screening(
            Novelty(str(candidate.status)),
            canonical=candidate.canonical or "",
            behaviour=Behaviour.from_bytes(candidate.behaviour),
            nearest=candidate.nearest or "",
        )
        history.add(candidate.name, found)
