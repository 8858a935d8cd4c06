"""What a factory's model is made from: weights on disk, and adapters that are merged into them in their order."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from selfdev.algorithms.source import Form
from selfdev.config import Config
from selfdev.factory.adapter import with_adapter, with_new_adapter
from selfdev.factory.packing import Model
from selfdev.factory.prompt import ask
from selfdev.factory.warm_start import END
from selfdev.models.folder import load_model, weights_hash
from selfdev.models.sources import cache_dir, resolve


@dataclass(frozen=True)
class Blueprint:
    """What a model is made from.

    Attributes:
        weights: folder.
        adapters: folders, the first one merged first.
    """

    weights: Path
    adapters: tuple[Path, ...] = ()

    def load(self, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Make it: of this type, on this device, in evaluation mode."""
        model: Any = load_model(self.weights, getattr(torch, dtype)).to(device)
        for folder in self.adapters:
            model = with_adapter(model, folder).merge_and_unload()
        made: PreTrainedModel = model.eval()
        return made


class Assembly:
    """The factory's own weights, the warm start, and what an arm has learned.

    The model in memory is always made from these, so that a resumed run has the numbers of an unbroken one. With
    `refinement.train: full` what an arm has learned is a whole model in the place of an adapter.

    Attributes:
        folder: of the factory's weights.
        hash: of these.
        device: on which models are made.

    Args:
        config: of the run.
        sources: the worked examples, by name, that a warm start is trained on.
        device: see above.
    """

    def __init__(self, config: Config, sources: Mapping[str, str], device: torch.device):
        self._config = config
        self._sources = sources
        self.device = device
        self.folder = resolve(config.factory.model)
        self.hash = weights_hash(self.folder)

    def blueprint(self, adapters: Sequence[Path]) -> Blueprint:
        """What the model with an arm's adapters is made from."""
        if adapters and self._config.refinement.train == "full":
            return Blueprint(adapters[-1])
        return Blueprint(self.folder, tuple(self.layers(adapters)))

    def base(self) -> PreTrainedModel:
        """The model without a warm start."""
        return Blueprint(self.folder).load(self._config.factory.dtype, self.device)

    def model(self, adapters: Sequence[Path]) -> PreTrainedModel:
        """The model with an arm's adapters."""
        return self.blueprint(adapters).load(self._config.factory.dtype, self.device)

    def trainable(self, model: PreTrainedModel, seed: int) -> Model:
        """What a round trains of a model: a new adapter on it, or the whole of it."""
        settings = self._config.refinement
        if settings.train == "lora":
            return with_new_adapter(model, settings.rank, seed)
        whole: PreTrainedModel = model.requires_grad_(True)
        return whole

    def beneath(self, adapters: Sequence[Path]) -> list[Path]:
        """Which of an arm's adapters stay where the one is taken off that a round trains in going on from them."""
        return [] if self._config.refinement.one_adapter else list(adapters)

    def trainee(self, adapters: Sequence[Path], seed: int) -> Model:
        """What a round trains in going on from an arm's adapters: the one that all rounds train, or see `trainable`."""
        model = self.model(self.beneath(adapters))
        if adapters and self._config.refinement.one_adapter:
            return with_adapter(model, adapters[-1], trained=True)
        return self.trainable(model, seed)

    def layers(self, adapters: Sequence[Path]) -> list[Path]:
        """All that is merged into the weights, in its order: the warm start's adapter, and an arm's own."""
        warm = self.warm_start
        return ([] if warm is None else [warm]) + list(adapters)

    @property
    def warm_start(self) -> Path | None:
        """Where the warm start's adapter lies, or will lie; None without a warm start."""
        settings = self._config.factory.warm_start
        if settings.steps == 0:
            return None
        names = sorted(self._sources)[: self._config.prompt.shown]
        asked = ask(names, self._sources, Form.SHORT).text  # and with it whatever stands around the examples
        content = [self.hash, self._sources, settings.model_dump(), len(names), asked, END]
        if self._config.factory.dtype != "float32":
            content.append(self._config.factory.dtype)
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "warm-start" / key
