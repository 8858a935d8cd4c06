"""The Self-Developing cycle (Ishibashi et al. 2025, arXiv 2410.15639).

Every step asks the archive first whether it is done, so the same code begins a run and resumes it.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfdev.algorithms.screening import History, Novelty
from selfdev.archive import Archive, Candidate, Evaluation, Iteration
from selfdev.candidates import candidate_name, history_of, remember, screened, unscreened
from selfdev.config import Config
from selfdev.evaluation.course import DEVELOPMENT, Course
from selfdev.evaluation.evaluator import Refused, Scorer, Trivial, score_again, score_seed
from selfdev.evaluation.rivals import spent_on_candidates, tune_rivals
from selfdev.evaluation.standing import LEARNING, NORMED, is_written, ranked_new, repairs_of
from selfdev.evaluation.verdict import finalists, reach_verdict
from selfdev.learning import Learning
from selfdev.roles import Factory, Screener
from selfdev.watcher import Watcher
from selfdev.writing import Writing

log = logging.getLogger(__name__)


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

    def learning(self, arm: str) -> Learning:
        """How an arm is asked and trained."""
        return Learning(arm, self.config, self.archive, self.factory, self.screen, self.watch, self.folder)

    def run(self) -> None:
        """Run to the verdict, from wherever the archive stands."""
        if self.archive.run.status == "running":
            score_seed(self.archive, self.scorer)
            for t in range(self.config.iterations):
                for arm in (LEARNING, *self.config.controls):
                    self._write(arm, t)
                    self._judge(arm, t)
                self._tune_rivals()
                if t + 1 < self.config.iterations:
                    for learning in map(self.learning, (LEARNING, *self.config.controls)):
                        if learning.learns:
                            learning.repair(t)
                            self._judge_repairs(learning.arm, t)
                            learning.learn(t)
            for arm in (LEARNING, *self.config.controls):
                self._tune_scales(arm)
            self._tune_rivals()
        if self.archive.run.status != "done":
            entrants = finalists(self.archive, self.config)
            with self.watch.phase("verdict") as tick:
                reach_verdict(self.archive, self.config, self.scorer, entrants, tick)

    def _write(self, arm: str, t: int) -> None:
        """The arm's factory writes its programs of iteration t, at this iteration's temperature."""
        if self.archive.iteration(arm, t) is not None:
            return
        learning = self.learning(arm)
        adapters = learning.adapters()
        with self.watch.phase("write", arm, t) as tick:
            prompts = learning.prompts(t)
            twin = self._same_factory(arm, t, adapters, [prompt.text for prompt in prompts])
            if twin is not None:
                self._take_over(twin, arm)
                return
            writing = Writing(self.config, self.factory, self.screen, arm, t, adapters, tick)
            asked, written = writing.write(prompts)
            if 4 * sum(c.cut_off for c in written) > 3 * len(written):
                log.warning(
                    "most of these programs were cut off at factory.max_new_tokens, %s; docs/sampling.md says what "
                    "helps a model that thinks aloud",
                    self.config.factory.max_new_tokens,
                )
            if 4 * sum(c.finished and not c.text for c in written) > 3 * len(written):
                log.warning(
                    "most of these answers are empty; a model that thinks aloud may have put all into its thoughts, "
                    "which prompt.template switches off, or for a server factory.endpoint.request"
                )
        texts = tuple(prompt.text for prompt in asked)
        self.archive.add_written(Iteration(arm, t, writing.temperature, texts, tick.seconds), written)

    def _same_factory(
        self, arm: str, t: int, adapters: Sequence[Path], prompts: Sequence[str]
    ) -> Iteration | None:
        """What another arm's equal factory wrote in this iteration: the same streams make it the same text."""
        for other in self.archive.iterations():
            if (
                is_written(other.arm)
                and other.iteration == t
                and other.arm != arm
                and list(other.prompts[: len(prompts)]) == prompts  # what follows is a repair turn's
                and not adapters
                and not self.learning(other.arm).adapters(t)
            ):
                return other
        return None

    def _take_over(self, twin: Iteration, arm: str) -> None:
        """Archive another arm's iteration as this one's too.

        In the first one no arm has a past, so what the programs are and score is the same as well; later they may
        repeat what the other arm did not write.
        """
        t = twin.iteration
        written = self.archive.candidates(twin.arm, t)
        name = {c.name: candidate_name(arm, t, c.number) for c in written}
        known = [
            e for kind in ("candidate", "scaled") for e in self.archive.evaluations(kind) if e.subject in name
        ]
        scored = [replace(e, subject=name[e.subject]) for e in known if t == 0]
        written = [
            replace(c, name=name[c.name], arm=arm, nearest=name.get(c.nearest or "", c.nearest))
            for c in (written if t == 0 else map(unscreened, written))
        ]
        self.archive.add_written(replace(twin, arm=arm), written, scored)
        for candidate in written:
            if candidate.status is not None:
                self.watch.screened(candidate, None)
        for evaluation in scored:
            if evaluation.kind == "scaled":
                self.watch.scored(evaluation)

    def _judge(self, arm: str, t: int) -> None:
        """Screen every program, and score on development those that are new."""
        course = Course(self.archive, self.config, arm, t)
        with self.watch.phase("judge", arm, t) as tick:
            history = history_of(self.archive, arm)
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
        self._try_norm(arm, t, {evaluation.subject for evaluation in finished})

    def _judged(
        self, candidate: Candidate, history: History, course: Course
    ) -> tuple[Candidate, Evaluation | None]:
        began = time.monotonic()
        found = self.screen(candidate.source or "", history)
        candidate = replace(screened(candidate, found), screening=time.monotonic() - began)
        evaluation = None
        if found.novelty is Novelty.NEW:
            candidate, evaluation = self._scored(candidate, course.start)
        self.archive.set_screened(candidate, evaluation)
        remember(history, candidate)
        return candidate, evaluation

    def _scored(
        self, candidate: Candidate, ask: Callable[[Scorer, Candidate], Evaluation]
    ) -> tuple[Candidate, Evaluation | None]:
        """Score a program that is new; it is not, if that fails or the real tensors show otherwise."""
        try:
            evaluation = ask(self.scorer, candidate)
        except Trivial as trivial:
            return replace(candidate, status="trivial", error=trivial.error), None
        except Refused as refused:
            return replace(candidate, status="failed", failure=refused.failure, error=refused.error), None
        if evaluation.failure is not None:
            candidate = replace(candidate, status="failed", failure="ScoringError", error=evaluation.failure)
        return candidate, evaluation

    def _judge_repairs(self, arm: str, t: int) -> None:
        """Score what the arm's failing programs were repaired to, on every question, if repairs are to be scored."""
        if not self.config.preferences.score_repairs:
            return
        arm = repairs_of(arm)
        with self.watch.phase("score", arm, t) as tick:
            repaired = [c for c in self.archive.candidates(arm, t) if c.status == "new"]
            known = {e.subject for e in self.archive.evaluations("candidate")}
            for done, candidate in enumerate(repaired):
                tick(done, len(repaired), "")
                if candidate.name not in known:
                    asked = self._scored(candidate, lambda scorer, it: scorer.candidate(it, DEVELOPMENT))
                    self.archive.set_screened(*asked)
            tick(len(repaired), len(repaired), "")
        self._try_norm(arm, t, {c.name for c in self.archive.candidates(arm, t) if c.status == "new"})

    def _try_norm(self, arm: str, t: int, names: Collection[str]) -> None:
        """Score an iteration's programs at `scaling.norm` too, if there is one."""
        norm = self.config.scaling.norm
        if norm is not None:
            scales = [(c, NORMED, 1.0, norm) for c in self.archive.candidates(arm, t) if c.name in names]
            self._try_scales("scale", scales, arm, t)

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
        budget = spent_on_candidates(self.archive)
        with self.watch.phase("rivals") as tick:
            tune_rivals(self.archive, self.config, self.scorer, budget, tick, self.watch.rival)
