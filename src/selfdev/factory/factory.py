"""The factory in process: a causal language model, its prompts, and the adapters that it has learned."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from selfdev.algorithms.examples import examples
from selfdev.config import Config
from selfdev.errors import SelfdevError
from selfdev.factory.prompt import STOP, Prompt, ask, deal
from selfdev.factory.refinement import Preference, plan, refine
from selfdev.factory.sampling import Sample, Sampler, check_context
from selfdev.factory.warm_start import completion, warm_start
from selfdev.models.folder import load_model, load_tokenizer, weights_hash
from selfdev.models.sources import cache_dir, resolve
from selfdev.streams import stream_seed

log = logging.getLogger(__name__)

Tick = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a note."""


class LocalFactory:
    """Writes programs and learns from pairs.

    The model in memory is always made from the weights on disk and a list of adapters, merged in their order, so
    that a resumed run has the numbers of an unbroken one.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder = resolve(config.factory.model)
        self.tokenizer = load_tokenizer(self.folder)
        self.weights = weights_hash(self.folder)
        self._sources = examples()
        self._loaded: tuple[PreTrainedModel, tuple[Path, ...]] | None = None
        longest = max(len(prompt.tokens(self.tokenizer)) for prompt in self.prompts(0))
        check_context(AutoConfig.from_pretrained(self.folder), longest + config.factory.max_new_tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """What the archive keeps of it, once it is prepared."""
        warm = self._warm_folder()
        return {
            "model": self.config.factory.model,
            "weights": self.weights,
            "warm_start": None if warm is None else weights_hash(warm),
        }

    def prepare(self, tick: Tick) -> None:
        """Make the warm start's adapter, if there is to be one and it is not in the cache."""
        folder = self._warm_folder()
        if folder is None or folder.is_dir():
            return
        settings = self.config.factory.warm_start
        model = _with_adapter(load_model(self.folder), settings.rank, settings.seed)
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
        )
        _save(model, folder)

    def prompts(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration: one and always the same, or dealt out anew."""
        settings = self.config.prompt
        if settings.examples == "fixed":
            return [ask(settings.names, self._sources, settings.form)]
        seed = stream_seed(self.config.seed, "prompts", iteration)
        hands = deal(self._sources, settings.prompts, settings.shown, seed)
        return [ask(names, self._sources, settings.form) for names in hands]

    def write(
        self,
        prompts: Sequence[Prompt],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Tick,
    ) -> list[tuple[int, Sample]]:
        """Write the programs of one iteration.

        Args:
            prompts: each gets an equal share of the programs, neighbours in the order.
            iteration: with the program's number it names the random stream.
            temperature: of the sampling.
            adapters: what the arm has learned so far, in order.
            tick: progress.

        Returns:
            For each program the index of its prompt, and what was written.
        """
        settings = self.config.factory
        model = self._model(adapters)
        sampler = Sampler(temperature, settings.top_p, settings.max_new_tokens, STOP[self.config.prompt.form])
        tokens = [prompt.tokens(self.tokenizer) for prompt in prompts]
        count = self.config.programs
        owner = [number * len(prompts) // count for number in range(count)]
        written: list[tuple[int, Sample]] = []
        for start in range(0, count, settings.batch):
            numbers = range(start, min(start + settings.batch, count))
            used = sorted({owner[number] for number in numbers})
            rows = [
                [stream_seed(self.config.seed, "sample", iteration, n) for n in numbers if owner[n] == prompt]
                for prompt in used
            ]
            samples = sampler(
                model,
                self.tokenizer,
                [tokens[prompt] for prompt in used],
                rows,
                lambda finished, total, start=start: tick(start + finished, count, f"{total} tokens"),  # type: ignore[misc]
            )
            written += [(prompt, s) for prompt, group in zip(used, samples, strict=True) for s in group]
        return written

    def refine(
        self,
        pairs: Sequence[tuple[Prompt, tuple[int, ...], tuple[int, ...]]],
        iteration: int,
        adapters: Sequence[Path],
        out: Path,
        tick: Tick,
    ) -> dict[str, Any]:
        """Train a new adapter on pairs, and save it.

        Args:
            pairs: at least one: the prompt, token ids of the chosen program, those of the rejected one.
            iteration: names the random stream.
            adapters: what the new one stands on, and its reference.
            out: the adapter's folder, written aside and renamed.
            tick: progress.

        Returns:
            What the archive keeps: settings, losses, hash of the adapter.
        """
        settings = self.config.refinement
        seed = stream_seed(self.config.seed, "refine", iteration)
        self._loaded = None  # two models at once would double the memory
        model = _with_adapter(self._build(adapters), settings.rank, seed)
        asked = {prompt: tuple(prompt.tokens(self.tokenizer)) for prompt, _, _ in pairs}
        known = {tokens: self._rehearsed(prompt) for prompt, tokens in asked.items()}
        preferences = [Preference(asked[prompt], chosen, rejected) for prompt, chosen, rejected in pairs]
        preferences += self._shunned(pairs)
        steps = plan(preferences, settings.pairs_a_step, seed, settings.rehearsal, known)
        total = len(steps) * (1 + settings.epochs)
        losses = refine(
            model,
            steps,
            beta=settings.beta,
            learning_rate=settings.learning_rate,
            epochs=settings.epochs,
            supervised=settings.supervised,
            tick=lambda done: tick(done, total, f"{len(pairs)} pairs"),
        )
        _save(model, out)
        return {
            "pairs": len(pairs),
            "shunned": len(preferences) - len(pairs),
            "steps": len(steps),
            "refit": settings.refit,
            "reference": "first" if settings.refit == "fresh" else "previous",
            "losses": [asdict(each) for each in losses],
            "adapter": weights_hash(out),
        }

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
        ]

    def _model(self, adapters: Sequence[Path]) -> PreTrainedModel:
        wanted = tuple(adapters)
        if self._loaded is None or self._loaded[1] != wanted:
            self._loaded = None
            self._loaded = self._build(wanted), wanted
        return self._loaded[0]

    def _build(self, adapters: Sequence[Path]) -> PreTrainedModel:
        model: Any = load_model(self.folder)
        warm = self._warm_folder()
        for folder in ([] if warm is None else [warm]) + list(adapters):
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        built: PreTrainedModel = model.eval()
        return built

    def _warm_key(self) -> str | None:
        settings = self.config.factory.warm_start
        if settings.steps == 0:
            return None
        content = [self.weights, self._sources, settings.model_dump(), self.config.prompt.shown]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _warm_folder(self) -> Path | None:
        key = self._warm_key()
        return None if key is None else cache_dir() / "warm-start" / key


def _with_adapter(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Put a new adapter on a model, which changes nothing yet; the global random stream is left alone."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, lora)
    return adapted


def _save(model: PeftModel, folder: Path) -> None:
    """Save an adapter aside and rename it, so that a folder of that name is always whole."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(aside)
    except SafetensorError as error:
        raise SelfdevError(f"{folder} could not be written: {error}; is the disk full?") from error
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
