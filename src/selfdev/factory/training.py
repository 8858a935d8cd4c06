"""One round of learning: programs are imitated, then pairs preferred, and what comes of it is saved."""

import gc
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfdev.config import Config
from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import beside, load_moments, move_learned, remove_left, save_learned
from selfdev.factory.assembly import Assembly, Blueprint
from selfdev.factory.imitation import Lesson, imitate, lessons
from selfdev.factory.losses import LARGEST_FLIP_RATE
from selfdev.factory.memory import Packed, fitting_pairs, fitting_pass
from selfdev.factory.optimiser import Moments
from selfdev.factory.packing import Model
from selfdev.factory.prompt import Prompt
from selfdev.factory.refinement import Diverged, Outcome, Preference, Report, Step, consult, plan, refine
from selfdev.factory.taught import Taught, Tokens
from selfdev.factory.trl_processes import LEARNED, START, Round, check_devices, refine_in_processes
from selfdev.factory.warm_start import completion
from selfdev.models.folder import weights_hash
from selfdev.settings import RefinementSettings
from selfdev.streams import stream_seed

Tick = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a note."""


def check_backend(settings: RefinementSettings, device: torch.device) -> None:
    """Raise UserError if TRL is asked for and not there, or not as it is asked for."""
    if settings.backend == "trl" and importlib.util.find_spec("trl") is None:
        raise UserError("refinement.backend: trl needs TRL; pip install 'selfdev[trl]', or set it to own")
    if settings.backend == "trl" and device.type == "cuda":
        check_devices(settings.devices, torch.cuda.device_count())


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
        check_backend(config.refinement, assembly.device)
        self.config = config
        self._assembly = assembly
        self._tokenizer = tokenizer
        self._sources = sources
        self._free = free

    @property
    def learns(self) -> bool:
        """Whether there are rounds of learning at all."""
        return self.config.refinement.refit != "never" and self.config.iterations > 1

    @property
    def packs(self) -> bool:
        """Whether rounds go through packed passes, and not through TRL alone."""
        settings = self.config.refinement
        return self.learns and (settings.backend == "own" or settings.imitation.passes > 0)

    def check(self, model: PreTrainedModel, prompt: int) -> None:
        """Make sure that programs of the greatest length can be trained on; the model is left as it was.

        Args:
            model: of the factory, loaded already.
            prompt: tokens of the longest.

        Raises:
            SelfdevError: there is too little memory.
        """
        settings, free = self.config.refinement, self._free(self._assembly.device)
        if free is None:
            return
        longest = Lesson((0,) * prompt, ((0,) * self.config.factory.max_new_tokens,))
        trainee = self._assembly.trainable(model, seed=0)
        try:
            if self.packs:
                fitting_pass(trainee, [longest], settings, free)
            if settings.backend == "trl" and self.config.preferences.pairs:
                # Rounds may stand on one model and be held to another.
                apart = (settings.held_to == "first") != (
                    settings.refit == "fresh"
                ) and not settings.one_adapter
                other = settings.train == "full" or apart
                fitting_pairs(trainee, [longest], settings.pairs_a_step, settings, free, other)
        finally:
            (trainee.unload() if isinstance(trainee, PeftModel) else model).requires_grad_(False)

    def refine(
        self, taught: Taught, iteration: int, adapters: Sequence[Path], out: Path, tick: Tick
    ) -> dict[str, Any]:
        """Train an adapter or all weights and save them; the arguments are those of `LocalFactory.refine`."""
        settings = self.config.refinement
        seed = stream_seed(self.config.seed, "refine", iteration)
        imitated = self._lessons(taught.imitated, seed)
        pairs, skipped = taught.pairs, {}
        if len(pairs) < max(settings.min_pairs, settings.devices):
            least = "min_pairs" if settings.min_pairs >= settings.devices else "devices"
            why = f"{len(pairs)} pairs, fewer than refinement.{least} ({getattr(settings, least)})"
            if not imitated:
                return {"skipped": why}
            skipped, pairs = {"preferences_skipped": why}, []
        asked = {prompt: tuple(prompt.tokens(self._tokenizer)) for prompt, _, _ in pairs}
        known = {tokens: self._rehearsed(prompt) for prompt, tokens in asked.items()}
        preferences = [Preference(asked[prompt], chosen, rejected) for prompt, chosen, rejected in pairs]
        preferences += self._shunned(pairs)
        steps = plan(preferences, settings.pairs_a_step, seed, settings.rehearsal, known)
        # What is shunned is rejected for being shown: none of it can be the wrong way round.
        measured = taught.flip_rate * len(pairs) / max(1, len(preferences))
        flip_rate = measured if settings.flip_rate == "measured" else settings.flip_rate
        facts = {
            "pairs": len(pairs),
            "shunned": len(preferences) - len(pairs),
            "steps": len(steps),
            "imitation_steps": len(imitated),
            "backend": settings.backend,
            "devices": settings.devices,
            "train": settings.train,
            "loss": settings.loss,
            "flip_rate": min(flip_rate, LARGEST_FLIP_RATE),
            "refit": settings.refit,
            "optimizer": settings.optimizer,
            "reference": settings.held_to,
            **skipped,
        }
        ground = [] if settings.refit == "fresh" else list(adapters)
        reference = [] if settings.held_to == "first" else list(adapters)
        remove_left(out)  # a run's folder is locked; the cache of warm starts is not
        try:
            done = self._train(ground, reference, imitated, steps, seed, out, facts, tick)
        except Diverged as error:
            return facts | {"rolled_back": str(error)}
        except torch.OutOfMemoryError as error:
            raise SelfdevError(
                f"refinement: {str(error).splitlines()[0]} Free memory on the GPU and resume, or begin a run with a "
                "lower refinement.pairs_a_step or refinement.rank"
            ) from error
        return facts | {
            "losses": [asdict(each) for each in done.losses],
            "stopped": done.stopped,
            "adapter": weights_hash(out),
        }

    def _train(
        self,
        ground: Sequence[Path],
        reference: Sequence[Path],
        imitated: Sequence[Lesson],
        steps: Sequence[Step],
        seed: int,
        out: Path,
        facts: dict[str, Any],
        tick: Tick,
    ) -> Outcome:
        """Train a new adapter on top of `ground`, or `ground`'s own weights, held to `reference`, and save it.

        Notes how the passes were split.
        """
        settings, note = self.config.refinement, f"{facts['pairs']} pairs"
        by_trl = settings.backend == "trl"
        packed: list[Packed] = [*imitated, *([] if by_trl else steps)]
        model, free = self._assembly.trainee(ground, seed), self._free(self._assembly.device)
        tokens_a_pass = fitting_pass(model, packed, settings, free) if packed else None
        pairs = sum(len(step.pairs) for step in steps)
        facts |= {
            "tokens_a_pass": tokens_a_pass,
            "pairs_a_pass": None,
            "pairs_left_out": pairs % settings.devices,
        }
        if not steps:
            self._imitate(model, imitated, facts, tick)
            done = Outcome([], moments=self._moments(ground))
        elif by_trl:
            other = isinstance(self._held_to(ground, reference), Blueprint)
            facts["pairs_a_pass"] = fitting_pairs(model, steps, pairs, settings, free, other)
            self._imitate(model, imitated, facts, tick)
            facts["steps"] = math.ceil((pairs - pairs % settings.devices) / settings.pairs_a_step)
            total = settings.epochs * facts["steps"]
            report = partial(self._report, tick, total, note)
            if settings.devices > 1:
                with beside(out) as folder:
                    save_learned(model, folder / START)
                    del model  # the processes need its place
                    done = self._in_processes(folder, ground, reference, steps, facts, report)
                    move_learned(folder / LEARNED, out)
                return done
            done = self._by_trl(model, ground, reference, steps, facts, report)
        else:
            total = len(steps) * (1 + settings.epochs)
            report = partial(self._report, tick, total, note)
            beneath = self._assembly.beneath(ground)
            if reference in (beneath, ground):
                whole = reference != beneath
                references = consult(model, steps, settings, tokens_a_pass, report, whole=whole)
            else:
                del model
                references = consult(self._assembly.model(reference), steps, settings, tokens_a_pass, report)
                model = self._assembly.trainee(ground, seed)
            self._imitate(model, imitated, facts, tick)
            done = refine(
                model,
                steps,
                references,
                settings,
                flip_rate=facts["flip_rate"],
                tokens_a_pass=tokens_a_pass,
                moments=self._moments(ground),
                tick=lambda step: report(len(steps) + step),
            )
        save_learned(model, out, done.moments)
        return done

    @staticmethod
    def _report(tick: Tick, total: int, note: str, step: int) -> None:
        tick(step, total, note)

    def _by_trl(
        self,
        model: Model,
        ground: Sequence[Path],
        reference: Sequence[Path],
        steps: Sequence[Step],
        facts: Mapping[str, Any],
        report: Report,
    ) -> Outcome:
        from selfdev.factory.trl_backend import refine_with_trl

        held = self._held_to(ground, reference)
        return refine_with_trl(
            model,
            self._assembly.model(reference) if isinstance(held, Blueprint) else held,
            self._tokenizer,
            steps,
            self.config.refinement,
            flip_rate=facts["flip_rate"],
            pairs_a_pass=facts["pairs_a_pass"],
            moments=self._moments(ground),
            tick=report,
        )

    def _in_processes(
        self,
        folder: Path,
        ground: Sequence[Path],
        reference: Sequence[Path],
        steps: Sequence[Step],
        facts: Mapping[str, Any],
        report: Report,
    ) -> Outcome:
        """The same on several devices, from what `folder` has to start with."""
        settings, device = self.config.refinement, self._assembly.device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        round_ = Round(
            self._assembly.blueprint(self._assembly.beneath(ground)),
            self._held_to(ground, reference),
            device.type,
            self.config.factory.dtype,
            self._assembly.folder,
            settings,
            facts["flip_rate"],
            facts["pairs_a_pass"],
            ground[-1] if ground and settings.optimizer == "continue" else None,
            steps,
        )
        return refine_in_processes(round_, folder, report)

    def _held_to(self, ground: Sequence[Path], reference: Sequence[Path]) -> Blueprint | Path | None:
        """What TRL takes for the reference.

        Returns:
            None for what is left where the adapter that is trained is taken off, an adapter to put in its place, or a
            model of its own.
        """
        settings = self.config.refinement
        if settings.train == "lora" and reference == self._assembly.beneath(ground):
            return None
        if settings.one_adapter and reference == ground:
            return ground[-1]
        return self._assembly.blueprint(reference)

    def _moments(self, ground: Sequence[Path]) -> Moments | None:
        """With which the optimiser of a round begins; none of no weight before there was a round of preferences."""
        if self.config.refinement.optimizer == "fresh":
            return None
        return load_moments(ground[-1]) if ground else {}

    def _lessons(self, imitated: Sequence[tuple[Prompt, Tokens]], seed: int) -> list[Lesson]:
        settings = self.config.refinement
        asked = {prompt: tuple(prompt.tokens(self._tokenizer)) for prompt, _ in imitated}
        known = {tokens: self._rehearsed(prompt) for prompt, tokens in asked.items()}
        programs = [(asked[prompt], tokens) for prompt, tokens in imitated]
        passes, together = settings.imitation.passes, settings.imitation.programs_a_step
        return lessons(programs, passes, together, seed, settings.rehearsal, known)

    def _imitate(self, model: Model, imitated: Sequence[Lesson], facts: dict[str, Any], tick: Tick) -> None:
        """Imitate programs, if there are any; notes the mean loss of each pass."""
        if not imitated:
            return
        settings = self.config.refinement.imitation
        total = len(imitated)
        losses = imitate(
            model,
            imitated,
            settings.learning_rate,
            lambda step, loss: tick(step + 1, total, f"imitation, {loss:.2f} nats a token"),
            facts["tokens_a_pass"],
        )
        once = total // settings.passes
        facts["imitation_losses"] = [
            sum(losses[start : start + once]) / once for start in range(0, total, once)
        ]

    def _rehearsed(self, prompt: Prompt) -> list[Tokens]:
        """The worked examples that a prompt does not show, as it would be continued with them."""
        return [tokens for name, tokens in self._worked.items() if name not in prompt.examples]

    @cached_property
    def _worked(self) -> dict[str, Tokens]:
        """All worked examples, as a prompt would be continued with them."""
        return {
            name: tuple(completion(self._tokenizer, source)) for name, source in sorted(self._sources.items())
        }

    def _shunned(self, pairs: Sequence[tuple[Prompt, Tokens, Tokens]]) -> list[Preference]:
        """Under each prompt, its chosen programs in turn preferred to the worked examples that it shows first."""
        chosen: dict[Prompt, dict[Tokens, None]] = {}
        for prompt, tokens, _ in pairs:
            chosen.setdefault(prompt, {})[tokens] = None
        return [
            Preference(
                tuple(prompt.tokens(self._tokenizer)),
                list(answers)[place % len(answers)],
                self._worked[name],
            )
            for prompt, answers in chosen.items()
            for place, name in enumerate(prompt.examples[: self.config.refinement.shun_examples])
            if name in self._worked  # a prompt of `showing` has a program among its examples
        ]
