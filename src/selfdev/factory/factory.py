"""The factory in process: a causal language model, its prompts, and the adapters that it has learned."""

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from selfdev.algorithms.examples import examples
from selfdev.config import Config
from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import load_moments, remove_left, save_learned, with_new_adapter
from selfdev.factory.grammar import Grammar
from selfdev.factory.imitation import Lesson, imitate, lessons
from selfdev.factory.losses import LARGEST_FLIP_RATE
from selfdev.factory.memory import Packed, available, check_batch, fitting_pairs, fitting_pass
from selfdev.factory.packing import Model, check_training
from selfdev.factory.prompt import LONGEST_ERROR, STOP, Prompt, correcting, prompts_of
from selfdev.factory.refinement import Diverged, Outcome, Preference, Step, consult, plan, refine
from selfdev.factory.sampling import Sample, Sampler, check_context
from selfdev.factory.warm_start import completion, warm_start
from selfdev.models.device import pick_device
from selfdev.models.folder import load_model, load_tokenizer, weights_hash
from selfdev.models.sources import cache_dir, resolve
from selfdev.settings import RefinementSettings
from selfdev.streams import stream_seed

log = logging.getLogger(__name__)

Tick = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a note."""


class LocalFactory:
    """Writes programs and learns from pairs.

    The model in memory is always made from the weights on disk and a list of adapters, merged in their order, so
    that a resumed run has the numbers of an unbroken one. With `refinement.train: full` what an arm has learned is a
    whole model in the place of an adapter; the last one is it.

    Args:
        config: of the run.
        free: how many bytes a device has left; None where nobody knows.
    """

    def __init__(self, config: Config, free: Callable[[torch.device], int | None] = available):
        self.config = config
        self._free = free
        if config.refinement.backend == "trl" and importlib.util.find_spec("trl") is None:
            raise UserError("refinement.backend: trl needs TRL; pip install 'selfdev[trl]', or set it to own")
        self.device = pick_device(config.factory.device)
        self.folder = resolve(config.factory.model)
        self.tokenizer = load_tokenizer(self.folder)
        self.weights = weights_hash(self.folder)
        self._sources = examples()
        self._loaded: tuple[PreTrainedModel, tuple[Path, ...]] | None = None
        model = AutoConfig.from_pretrained(self.folder)
        self._check_context(model)
        vocabulary = model.get_text_config().vocab_size
        self._grammar = Grammar(self.tokenizer, vocabulary) if config.factory.grammar == "python" else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the archive keeps of it, once it is prepared."""
        warm = self._warm_folder()
        facts = {
            "model": self.config.factory.model,
            "weights": self.weights,
            "warm_start": None if warm is None else weights_hash(warm),
        }
        return facts if self._grammar is None else facts | {"grammar": self._grammar.version}

    def _check_context(self, model: PreTrainedConfig) -> None:
        """Raise UserError unless the first iteration's prompts and what continues them fit the model."""
        limit, prompts = self.config.factory.max_new_tokens, self.prompts(0)
        check_context(model, max(len(prompt.tokens(self.tokenizer)) for prompt in prompts) + limit)
        if self.config.factory.repair_turn:
            empty = [correcting(prompt, "", "") for prompt in prompts]
            longest = max(len(prompt.tokens(self.tokenizer)) for prompt in empty)
            # A program that fails has no more than its limit, and its error at most a token a character.
            way_out = "set factory.repair_turn: false, use fewer examples or a smaller factory.max_new_tokens"
            check_context(model, longest + limit + LONGEST_ERROR + limit, way_out)

    def prepare(self, tick: Tick) -> None:
        """Make the warm start's adapter, if there is to be one and it is not in the cache.

        Before that, find out what would fail or go wrong later.

        Raises:
            UserError: the model is of a kind that cannot be trained here, or its batch does not fit into memory.
            SelfdevError: there is too little memory for the warm start or for a round, or the warm start has diverged.
        """
        folder = self._warm_folder()
        warm, writes = folder is not None and not folder.is_dir(), self.config.factory.endpoint is None
        if not (warm or writes or self._trains):
            return
        model = self._load() if warm else self.model([])
        if warm or self._trains:
            check_training(model)
        if writes:
            self._check_batch(model)
        if self._trains:
            self._check_round(model)
        if not writes:
            self._loaded = None
        if warm and folder is not None:
            self._warm_start(model, folder, tick)

    @property
    def _trains(self) -> bool:
        """Whether rounds of learning go through packed passes, and not through TRL alone."""
        settings = self.config.refinement
        learns = settings.refit != "never" and self.config.iterations > 1
        return learns and (settings.backend == "own" or settings.imitation.passes > 0)

    def _check_round(self, model: PreTrainedModel) -> None:
        """Raise SelfdevError unless one program of the greatest length can be trained on."""
        prompt = max((tuple(p.tokens(self.tokenizer)) for p in self.prompts(0)), key=len)
        longest = Lesson(prompt, ((0,) * self.config.factory.max_new_tokens,))
        trainee = self._trainable(model, seed=0)
        fitting_pass(trainee, [longest], self.config.refinement, self._free(self.device))
        # It writes as well, as it was.
        (trainee.unload() if isinstance(trainee, PeftModel) else model).requires_grad_(False)

    def _check_batch(self, model: PreTrainedModel) -> None:
        settings = self.config.factory
        prompts = [len(prompt.tokens(self.tokenizer)) for prompt in self.prompts(0)]
        rows = min(settings.batch, self.config.programs)
        check_batch(model, prompts, rows, settings.max_new_tokens, self._free(self.device))

    def _warm_start(self, base: PreTrainedModel, folder: Path, tick: Tick) -> None:
        settings = self.config.factory.warm_start
        model = with_new_adapter(base, settings.rank, settings.seed)
        warm_start(
            model,
            self.tokenizer,
            self._sources,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            shown=self.config.prompt.shown,
            targets=settings.targets,
            seed=settings.seed,
            tick=lambda step, loss: tick(step + 1, settings.steps, f"{loss:.2f} nats a token"),
            fitting=lambda lessons: fitting_pass(
                model, lessons, RefinementSettings(), self._free(self.device), "factory.warm_start"
            ),
        )
        save_learned(model, folder)

    def prompts(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration: one and always the same, or dealt out anew."""
        return prompts_of(self.config.prompt, self._sources, self.config.seed, iteration)

    def write(
        self,
        asked: Sequence[tuple[int, Prompt]],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Tick,
    ) -> list[Sample]:
        """Write programs, those of usual prompts all in one call of the sampler, which is what makes them repeatable.

        Args:
            asked: of each program its number within the iteration, and its prompt; the neighbours that have one and the
                same prompt share it.
            iteration: with the program's number it names the random stream.
            temperature: of the sampling.
            adapters: what the arm has learned so far, in order.
            tick: progress.

        Returns:
            What was written, in the order in which it was asked for.
        """
        settings = self.config.factory
        sampler = Sampler(
            temperature,
            settings.top_p,
            settings.max_new_tokens,
            STOP[self.config.prompt.form],
            settings.top_k,
            settings.min_p,
            settings.batch,
            self._grammar,
        )
        groups: list[tuple[Prompt, list[int]]] = []
        for number, prompt in asked:
            if not groups or groups[-1][0] is not prompt:
                groups.append((prompt, []))
            groups[-1][1].append(stream_seed(self.config.seed, "sample", iteration, number))
        # A call holds every prompt's keys and values, and a repair turn may ask by thousands of prompts.
        most = max(settings.batch, self.config.prompt.prompts)
        samples: list[Sample] = []

        def told(finished: int, tokens: int) -> None:
            tick(len(samples) + finished, len(asked), f"{tokens} tokens")

        for start in range(0, len(groups), most):
            part = groups[start : start + most]
            written = sampler(
                self.model(adapters),
                self.tokenizer,
                [prompt.tokens(self.tokenizer) for prompt, _ in part],
                [seeds for _, seeds in part],
                told,
            )
            samples += [sample for group in written for sample in group]
        return samples

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a completion that nobody sampled."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

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
        """Train a new adapter or all weights, on programs that are imitated and then on pairs, and save them.

        Args:
            pairs: the prompt, token ids of the chosen program, those of the rejected one.
            iteration: names the random stream.
            adapters: what the arm has learned so far, in order; `refinement.refit` and `reference` say whether the new
                one stands on it and is held to it.
            out: the folder of what is learned, written aside and renamed.
            tick: progress.
            flip_rate: share of the pairs that are probably the wrong way round, in 0..1; `refinement.flip_rate` may
                name another.
            imitated: prompts, and token ids of the programs that `refinement.imitation` imitates.

        Returns:
            What the archive keeps: settings, losses, hash of what is saved. With `skipped` or `rolled_back` among it,
            whose value says why, nothing is saved, and the factory stays what it was.

        Raises:
            SelfdevError: there is too little memory even for one program a pass, or what was reckoned was too little.
        """
        settings = self.config.refinement
        seed = stream_seed(self.config.seed, "refine", iteration)
        taught = self._lessons(imitated, seed)
        skipped = {}
        if len(pairs) < settings.min_pairs:
            why = f"{len(pairs)} pairs, fewer than refinement.min_pairs ({settings.min_pairs})"
            if not taught:
                return {"skipped": why}
            skipped, pairs = {"preferences_skipped": why}, []
        asked = {prompt: tuple(prompt.tokens(self.tokenizer)) for prompt, _, _ in pairs}
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
        self._loaded = None  # two models at once would double the memory
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
        moments = load_moments(ground[-1]) if ground and settings.optimizer == "continue" else None
        model = self._trainee(ground, seed)
        note = f"{facts['pairs']} pairs"
        packed: list[Packed] = [
            *taught,
            *(steps if settings.backend == "own" else []),
        ]  # TRL's passes are its own
        tokens_a_pass = None
        if packed:
            tokens_a_pass = fitting_pass(model, packed, settings, self._free(self.device))
        facts |= {"tokens_a_pass": tokens_a_pass, "pairs_a_pass": None}
        if not steps:
            self._imitate(model, taught, facts, tick)
            return model, Outcome([], moments=moments)
        if settings.backend == "trl":
            from selfdev.factory.trl_backend import refine_with_trl

            facts["pairs_a_pass"] = fitting_pairs(model, steps, settings, self._free(self.device))
            self._imitate(model, taught, facts, tick)
            # Without an adapter to be taken off, the reference is a second model.
            alone = settings.train == "lora" and reference == ground
            other = None if alone else self._build(reference)
            total = settings.epochs * math.ceil(sum(len(s.pairs) for s in steps) / settings.pairs_a_step)
            return model, refine_with_trl(
                model,
                other,
                self.tokenizer,
                steps,
                settings,
                flip_rate=facts["flip_rate"],
                pairs_a_pass=facts["pairs_a_pass"],
                moments=moments,
                tick=lambda done: tick(done, total, note),
            )
        total = len(steps) * (1 + settings.epochs)
        if reference != ground:
            del model
            references = consult(
                self._build(reference), steps, settings, tokens_a_pass, lambda done: tick(done, total, note)
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

    def _trainee(self, ground: Sequence[Path], seed: int) -> Model:
        """What a round trains: `ground` with a new adapter, or as a whole."""
        return self._trainable(self._build(ground), seed)

    def _trainable(self, model: PreTrainedModel, seed: int) -> Model:
        settings = self.config.refinement
        if settings.train == "lora":
            return with_new_adapter(model, settings.rank, seed)
        whole: PreTrainedModel = model.requires_grad_(True)
        return whole

    def _lessons(self, imitated: Sequence[tuple[Prompt, tuple[int, ...]]], seed: int) -> list[Lesson]:
        settings = self.config.refinement
        asked = {prompt: tuple(prompt.tokens(self.tokenizer)) for prompt, _ in imitated}
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
            tuple(completion(self.tokenizer, source))
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
                tuple(prompt.tokens(self.tokenizer)),
                list(answers)[place % len(answers)],
                tuple(completion(self.tokenizer, self._sources[name])),
            )
            for prompt, answers in chosen.items()
            for place, name in enumerate(prompt.examples[: self.config.refinement.shun_examples])
            if name in self._sources  # a prompt of `showing` has a program among its examples
        ]

    def model(self, adapters: Sequence[Path]) -> PreTrainedModel:
        """The model that writes, with what an arm has learned so far."""
        wanted = tuple(adapters)
        if self._loaded is None or self._loaded[1] != wanted:
            self._loaded = None
            self._loaded = self._build(wanted), wanted
        return self._loaded[0]

    def _load(self, folder: Path | None = None) -> Any:
        """Weights, by default the factory's own, on its device and of its type."""
        return load_model(folder or self.folder, getattr(torch, self.config.factory.dtype)).to(self.device)

    def _build(self, adapters: Sequence[Path]) -> PreTrainedModel:
        whole = bool(adapters) and self.config.refinement.train == "full"
        model: Any = self._load(adapters[-1] if whole else None)
        for folder in [] if whole else self.layers(adapters):
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        built: PreTrainedModel = model.eval()
        return built

    def layers(self, adapters: Sequence[Path]) -> list[Path]:
        """All that is merged into the weights, in its order: the warm start's adapter, and an arm's own."""
        warm = self._warm_folder()
        return ([] if warm is None else [warm]) + list(adapters)

    def _warm_key(self) -> str | None:
        settings = self.config.factory.warm_start
        if settings.steps == 0:
            return None
        content = [self.weights, self._sources, settings.model_dump(), self.config.prompt.shown]
        if self.config.factory.dtype != "float32":
            content.append(self.config.factory.dtype)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _warm_folder(self) -> Path | None:
        key = self._warm_key()
        return None if key is None else cache_dir() / "warm-start" / key
