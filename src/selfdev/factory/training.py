"""One round of learning: programs are imitated, then pairs preferred, and what comes of it is saved."""

import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfdev.config import Config
from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import load_moments, remove_left, save_learned
from selfdev.factory.assembly import Assembly
from selfdev.factory.imitation import Lesson, imitate, lessons
from selfdev.factory.losses import LARGEST_FLIP_RATE
from selfdev.factory.memory import Packed, fitting_pairs, fitting_pass
from selfdev.factory.optimiser import Moments
from selfdev.factory.packing import Model
from selfdev.factory.prompt import Prompt
from selfdev.factory.refinement import Diverged, Outcome, Preference, Step, consult, plan, refine
from selfdev.factory.trl_processes import LEARNED, START, Round, processes_of, refine_in_processes
from selfdev.factory.warm_start import completion
from selfdev.models.folder import weights_hash
from selfdev.streams import stream_seed

Tick = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a note."""


class Training:
    """Trains what an assembly makes.

    Args:
        config: of the run.
        assembly: of the factory.
        tokenizer: the factory's.
        sources: the worked examples, by name.
        free: how many bytes a device has left; None where nobody knows.

    Raises:
        UserError: TRL is asked for and not there, or not as it is asked for.
    """

    def __init__(
        self,
        config: Config,
        assembly: Assembly,
        tokenizer: PreTrainedTokenizerBase,
        sources: Mapping[str, str],
        free: Callable[[torch.device], int | None],
    ):
        settings = config.refinement
        if settings.backend == "trl" and importlib.util.find_spec("trl") is None:
            raise UserError("refinement.backend: trl needs TRL; pip install 'selfdev[trl]', or set it to own")
        self._processes = processes_of(settings)
        self.config = config
        self._assembly = assembly
        self._tokenizer = tokenizer
        self._sources = sources
        self._free = free

    @property
    def is_ours(self) -> bool:
        """Whether rounds of learning go through packed passes, and not through TRL alone."""
        settings = self.config.refinement
        learns = settings.refit != "never" and self.config.iterations > 1
        return learns and (settings.backend == "own" or settings.imitation.passes > 0)

    def check(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
        """Make sure that one program of the greatest length can be trained on; the model is left as it was.

        Args:
            model: of the factory, loaded already.
            prompts: of the first iteration.

        Raises:
            SelfdevError: there is too little memory.
        """
        prompt = max((tuple(p.tokens(self._tokenizer)) for p in prompts), key=len)
        longest = Lesson(prompt, ((0,) * self.config.factory.max_new_tokens,))
        trainee = self._assembly.trainable(model, seed=0)
        fitting_pass(trainee, [longest], self.config.refinement, self._free(self._assembly.device))
        (trainee.unload() if isinstance(trainee, PeftModel) else model).requires_grad_(False)

    def refine(
        self,
        pairs: Sequence[tuple[Prompt, tuple[int, ...], tuple[int, ...]]],
        iteration: int,
        adapters: Sequence[Path],
        out: Path,
        tick: Tick,
        flip_rate: float = 0.0,
        imitated: Sequence[tuple[Prompt, tuple[int, ...]]] = (),
    ) -> dict[str, Any]:
        """See `LocalFactory.refine`."""
        settings = self.config.refinement
        seed = stream_seed(self.config.seed, "refine", iteration)
        taught = self._lessons(imitated, seed)
        skipped = {}
        if len(pairs) < settings.min_pairs:
            why = f"{len(pairs)} pairs, fewer than refinement.min_pairs ({settings.min_pairs})"
            if not taught:
                return {"skipped": why}
            skipped, pairs = {"preferences_skipped": why}, []
        asked = {prompt: tuple(prompt.tokens(self._tokenizer)) for prompt, _, _ in pairs}
        known = {tokens: self._rehearsed(prompt) for prompt, tokens in asked.items()}
        preferences = [Preference(asked[prompt], chosen, rejected) for prompt, chosen, rejected in pairs]
        preferences += self._shunned(pairs)
        steps = plan(preferences, settings.pairs_a_step, seed, settings.rehearsal, known)
        if settings.flip_rate != "measured":
            flip_rate = settings.flip_rate
        facts = {
            "pairs": len(pairs),
            "shunned": len(preferences) - len(pairs),
            "steps": len(steps),
            "imitation_steps": len(taught),
            "backend": settings.backend,
            "train": settings.train,
            "loss": settings.loss,
            "flip_rate": min(flip_rate, LARGEST_FLIP_RATE),
            "refit": settings.refit,
            "reference": settings.held_to,
            **skipped,
        }
        ground = [] if settings.refit == "fresh" else list(adapters)
        reference = [] if settings.held_to == "first" else list(adapters)
        try:
            model, done = self._train(ground, reference, taught, steps, seed, facts, tick)
        except Diverged as error:
            return facts | {"rolled_back": str(error)}
        except torch.OutOfMemoryError as error:
            raise SelfdevError(
                f"refinement: {str(error).splitlines()[0]} Free memory on the GPU and resume, or begin a run with a "
                "lower refinement.pairs_a_step or refinement.rank"
            ) from error
        remove_left(out)  # a run's folder is locked; the cache of warm starts is not
        save_learned(model, out, done.moments)
        return facts | {
            "losses": [asdict(each) for each in done.losses],
            "stopped": done.stopped,
            "adapter": weights_hash(out),
        }

    def _train(
        self,
        ground: Sequence[Path],
        reference: Sequence[Path],
        taught: Sequence[Lesson],
        steps: Sequence[Step],
        seed: int,
        facts: dict[str, Any],
        tick: Tick,
    ) -> tuple[Model, Outcome]:
        """Train a new adapter on top of `ground`, or `ground` itself, held to `reference`.

        Notes how the passes were split.
        """
        settings = self.config.refinement
        packed: list[Packed] = [*taught, *(steps if settings.backend == "own" else [])]
        model, moments = self._trainee(ground, seed), self._moments(ground)
        free = self._free(self._assembly.device)
        tokens_a_pass = fitting_pass(model, packed, settings, free) if packed else None
        facts |= {"tokens_a_pass": tokens_a_pass, "pairs_a_pass": None}
        if not steps:
            self._imitate(model, taught, facts, tick)
            return model, Outcome([], moments=moments)
        if settings.backend == "trl":
            facts["pairs_a_pass"] = fitting_pairs(model, steps, settings, free, self._processes)
            self._imitate(model, taught, facts, tick)
            if settings.accelerate is None:
                return model, self._by_trl(model, ground, reference, steps, facts, moments, tick)
            with tempfile.TemporaryDirectory(prefix="selfdev-round-") as scratch:
                folder = Path(scratch)
                save_learned(model, folder / START)
                del model  # the processes need its place
                return self._in_processes(folder, ground, reference, steps, facts, tick)
        note = f"{facts['pairs']} pairs"
        total = len(steps) * (1 + settings.epochs)
        if reference != ground:
            del model
            references = consult(
                self._assembly.model(reference),
                steps,
                settings,
                tokens_a_pass,
                lambda done: tick(done, total, note),
            )
            model = self._trainee(ground, seed)
        else:
            references = consult(model, steps, settings, tokens_a_pass, lambda done: tick(done, total, note))
        self._imitate(model, taught, facts, tick)
        return model, refine(
            model,
            steps,
            references,
            settings,
            flip_rate=facts["flip_rate"],
            tokens_a_pass=tokens_a_pass,
            moments=moments,
            tick=lambda done: tick(len(steps) + done, total, note),
        )

    def _by_trl(
        self,
        model: Model,
        ground: Sequence[Path],
        reference: Sequence[Path],
        steps: Sequence[Step],
        facts: dict[str, Any],
        moments: Moments | None,
        tick: Tick,
    ) -> Outcome:
        from selfdev.factory.trl_backend import refine_with_trl

        return refine_with_trl(
            model,
            None if self._is_beneath(ground, reference) else self._assembly.model(reference),
            self._tokenizer,
            steps,
            self.config.refinement,
            flip_rate=facts["flip_rate"],
            pairs_a_pass=facts["pairs_a_pass"],
            moments=moments,
            tick=self._told(steps, facts, tick),
        )

    def _in_processes(
        self,
        folder: Path,
        ground: Sequence[Path],
        reference: Sequence[Path],
        steps: Sequence[Step],
        facts: dict[str, Any],
        tick: Tick,
    ) -> tuple[Model, Outcome]:
        """The same on the devices that accelerate knows, from what `folder` has to start with."""
        settings = self.config.refinement
        round_ = Round(
            self._assembly.made(ground),
            None if self._is_beneath(ground, reference) else self._assembly.made(reference),
            self.config.factory.dtype,
            self._assembly.folder,
            settings,
            facts["flip_rate"],
            facts["pairs_a_pass"],
            ground[-1] if ground and settings.optimizer == "continue" else None,
            steps,
        )
        outcome = refine_in_processes(round_, folder, self._told(steps, facts, tick))
        return round_.trainee(folder / LEARNED, self._assembly.device), outcome

    def _is_beneath(self, ground: Sequence[Path], reference: Sequence[Path]) -> bool:
        """Whether the reference is what is left where the adapter that is trained is taken off."""
        return self.config.refinement.train == "lora" and reference == ground

    def _told(self, steps: Sequence[Step], facts: dict[str, Any], tick: Tick) -> Callable[[int], None]:
        settings, pairs = self.config.refinement, sum(len(step.pairs) for step in steps)
        total = settings.epochs * math.ceil(pairs / settings.pairs_a_step)
        return lambda done: tick(done, total, f"{facts['pairs']} pairs")

    def _moments(self, ground: Sequence[Path]) -> Moments | None:
        """With which the optimiser of a round begins."""
        goes_on = ground and self.config.refinement.optimizer == "continue"
        return load_moments(ground[-1]) if goes_on else None

    def _trainee(self, ground: Sequence[Path], seed: int) -> Model:
        """What a round trains: `ground` with a new adapter, or as a whole."""
        return self._assembly.trainable(self._assembly.model(ground), seed)

    def _lessons(self, imitated: Sequence[tuple[Prompt, tuple[int, ...]]], seed: int) -> list[Lesson]:
        settings = self.config.refinement
        asked = {prompt: tuple(prompt.tokens(self._tokenizer)) for prompt, _ in imitated}
        known = {tokens: self._rehearsed(prompt) for prompt, tokens in asked.items()}
        programs = [(asked[prompt], tokens) for prompt, tokens in imitated]
        passes, together = settings.imitation.passes, settings.imitation.programs_a_step
        return lessons(programs, passes, together, seed, settings.rehearsal, known)

    def _imitate(self, model: Model, taught: Sequence[Lesson], facts: dict[str, Any], tick: Tick) -> None:
        """Imitate programs, if there are any; notes the mean loss of each pass."""
        if not taught:
            return
        settings = self.config.refinement.imitation
        total = len(taught)
        losses = imitate(
            model,
            taught,
            settings.learning_rate,
            lambda step, loss: tick(step + 1, total, f"imitation, {loss:.2f} nats a token"),
            facts["tokens_a_pass"],
        )
        once = total // settings.passes
        facts["imitation_losses"] = [
            sum(losses[start : start + once]) / once for start in range(0, total, once)
        ]

    def _rehearsed(self, prompt: Prompt) -> list[tuple[int, ...]]:
        """The worked examples that a prompt does not show, as it would be continued with them."""
        return [
            tuple(completion(self._tokenizer, source))
            for name, source in sorted(self._sources.items())
            if name not in prompt.examples
        ]

    def _shunned(self, pairs: Sequence[tuple[Prompt, tuple[int, ...], tuple[int, ...]]]) -> list[Preference]:
        """Under each prompt, its chosen programs in turn preferred to the worked examples that it shows first."""
        chosen: dict[Prompt, dict[tuple[int, ...], None]] = {}
        for prompt, tokens, _ in pairs:
            chosen.setdefault(prompt, {})[tokens] = None
        return [
            Preference(
                tuple(prompt.tokens(self._tokenizer)),
                list(answers)[place % len(answers)],
                tuple(completion(self._tokenizer, self._sources[name])),
            )
            for prompt, answers in chosen.items()
            for place, name in enumerate(prompt.examples[: self.config.refinement.shun_examples])
            if name in self._sources  # a prompt of `showing` has a program among its examples
        ]
