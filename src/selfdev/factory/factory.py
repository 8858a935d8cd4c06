"""The factory in process: a causal language model that writes programs, and what it is asked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from selfdev.algorithms.examples import examples
from selfdev.config import Config
from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import save_learned, with_new_adapter
from selfdev.factory.assembly import Assembly
from selfdev.factory.grammar import Grammar
from selfdev.factory.memory import available, check_batch, fitting_pass
from selfdev.factory.packing import check_training
from selfdev.factory.prompt import LONGEST_ERROR, STOP, Prompt, ask, correcting, prompts_of
from selfdev.factory.sampling import Sample, Sampler, check_context
from selfdev.factory.taught import Taught
from selfdev.factory.training import Tick, Training
from selfdev.factory.warm_start import warm_start
from selfdev.models.device import pick_device
from selfdev.models.folder import load_tokenizer, weights_hash
from selfdev.models.limits import WINDOW, context_limit
from selfdev.settings import RefinementSettings
from selfdev.streams import stream_seed


class LocalFactory:
    """Writes programs, and has its model trained (`training.py`) on what came of them.

    Args:
        config: of the run.
        free: how many bytes a device has left; None where nobody knows.
    """

    def __init__(self, config: Config, free: Callable[[torch.device], int | None] = available):
        self.config = config
        self._free = free
        self._sources = examples()
        self.device = pick_device(config.factory.device, "factory.device")
        self._assembly = Assembly(config, self._sources, self.device)
        self.tokenizer = load_tokenizer(self._assembly.folder)
        self._training = Training(config, self._assembly, self.tokenizer, self._sources, free)
        self._loaded: tuple[PreTrainedModel, tuple[Path, ...]] | None = None
        model = AutoConfig.from_pretrained(self._assembly.folder)
        self._check_context(model)
        vocabulary = model.get_text_config().vocab_size
        self._grammar = Grammar(self.tokenizer, vocabulary) if config.factory.grammar == "python" else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the archive keeps of it, once it is prepared."""
        warm = self._assembly.warm_start
        facts = {
            "model": self.config.factory.model,
            "weights": self._assembly.hash,
            "warm_start": None if warm is None else weights_hash(warm),
        }
        return facts if self._grammar is None else facts | {"grammar": self._grammar.version}

    def _most_tokens(self) -> list[int]:
        """The most tokens that each prompt of an iteration may have, whichever iteration and arm it is of."""
        settings, shows = self.config.factory, self.config.shows_programs
        most: dict[int, int] = {}
        for t in range(self.config.iterations):
            for place, prompt in enumerate(self.prompts(t)):
                asked = [len(prompt.tokens(self.tokenizer))]
                if shows:  # a program that was written, in the place of the last example
                    rest = ask(prompt.examples[:-1], self._sources, prompt.form, prompt.template)
                    asked.append(len(rest.tokens(self.tokenizer)) + settings.max_new_tokens)
                most[place] = max(most.get(place, 0), *asked)
        return list(most.values())

    def _of_a_turn(self) -> int:
        """How many tokens a repair turn adds to a prompt at the most; 0 where there is none."""
        if not self.config.factory.repair_turn:
            return 0
        usual = self.prompts(0)[0]
        said = [len(each.tokens(self.tokenizer)) for each in (usual, correcting(usual, "", ""))]
        # A program that fails has no more than its limit, and its error at most a token a character.
        return said[1] - said[0] + LONGEST_ERROR + self.config.factory.max_new_tokens

    def _check_context(self, model: PreTrainedConfig) -> None:
        """Raise UserError unless the prompts of all iterations and what continues them fit the model."""
        longest = max(self._most_tokens()) + self.config.factory.max_new_tokens
        check_context(model, longest)
        if self.config.factory.repair_turn:
            longest += self._of_a_turn()
            way_out = "set factory.repair_turn: false, use fewer examples or a smaller factory.max_new_tokens"
            check_context(model, longest, way_out)
        window = context_limit(model, WINDOW)
        if window is not None and longest > window[1] and (self._training.packs or self._assembly.warm_start):
            raise UserError(
                f"factory.model: layers of it see {window[1]} tokens back ({window[0]}), and cannot be trained here on "
                f"prompt and program of {longest}; use fewer examples or a smaller factory.max_new_tokens, or set "
                "refinement.backend: trl (with refinement.imitation.passes: 0 and factory.warm_start.steps: 0)"
            )

    def prepare(self, tick: Tick) -> None:
        """Make the warm start's adapter, if there is to be one and it is not in the cache.

        Before that, find out what would fail or go wrong later.

        Raises:
            UserError: the model is of a kind that cannot be trained here, or its batch does not fit into memory.
            SelfdevError: there is too little memory for the warm start or for a round, or the warm start has diverged.
        """
        folder = self._assembly.warm_start
        warm, writes = folder is not None and not folder.is_dir(), self.config.factory.endpoint is None
        learns, packs = self._training.learns, self._training.packs
        if not (warm or writes or learns):
            return
        model = self._assembly.base() if warm else self.model([])
        if warm or packs:
            check_training(model)
        if writes:
            self._check_batch(model)
        if learns:
            self._training.check(model, max(self._most_tokens()) + self._of_a_turn())
        if not writes:
            self._loaded = None
        if warm and folder is not None:
            self._warm_start(model, folder, tick)

    def _check_batch(self, model: PreTrainedModel) -> None:
        settings = self.config.factory
        prompts, turn = self._most_tokens(), self._of_a_turn()
        own = max(prompts) + turn if turn else 0
        rows = min(settings.batch, max(self.config.budgets))
        check_batch(model, prompts, rows, settings.max_new_tokens, self._free(self.device), own)

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
        if not folder.is_dir():  # another run's may have come meanwhile, and be in use
            save_learned(model, folder)

    def prompts(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration: one and always the same, or dealt out anew."""
        config = self.config
        return prompts_of(config.prompt, self._sources, config.seed, iteration, config.budget(iteration))

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

        Raises:
            SelfdevError: what was reckoned for the batch was too little.
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
            try:
                written = sampler(
                    self.model(adapters),
                    self.tokenizer,
                    [prompt.tokens(self.tokenizer) for prompt, _ in part],
                    [seeds for _, seeds in part],
                    told,
                )
            except torch.OutOfMemoryError as error:
                raise SelfdevError(
                    f"sampling: {str(error).splitlines()[0]} Free memory on the GPU and resume, or begin a run with a "
                    "smaller factory.batch"
                ) from error
            samples += [sample for group in written for sample in group]
        return samples

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a completion that nobody sampled."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def refine(
        self, taught: Taught, iteration: int, adapters: Sequence[Path], out: Path, tick: Tick
    ) -> dict[str, Any]:
        """Train an adapter or all weights, on programs that are imitated and then on pairs, and save them.

        Args:
            taught: the programs.
            iteration: names the random stream.
            adapters: what the arm has learned so far, in order; `refinement.refit` and `reference` say whether the
                round goes on from it and is held to it.
            out: the folder of what is learned, written aside and renamed.
            tick: progress.

        Returns:
            What the archive keeps: settings, losses, hash of what is saved. With `skipped` or `rolled_back` among it,
            whose value says why, nothing is saved, and the factory stays what it was.

        Raises:
            SelfdevError: there is too little memory even for one program a pass, or what was reckoned was too little.
        """
        self._loaded = None  # two models at once would double the memory
        return self._training.refine(taught, iteration, adapters, out, tick)

    def layers(self, adapters: Sequence[Path]) -> list[Path]:
        """All that is merged into the weights, in its order: the warm start's adapter, and an arm's own."""
        return self._assembly.layers(adapters)

    def model(self, adapters: Sequence[Path]) -> PreTrainedModel:
        """The model that writes, with what an arm has learned so far."""
        wanted = tuple(adapters)
        if self._loaded is None or self._loaded[1] != wanted:
            self._loaded = None
            self._loaded = self._assembly.model(wanted), wanted
        return self._loaded[0]
