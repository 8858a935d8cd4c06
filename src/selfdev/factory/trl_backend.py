"""A round of preference training by TRL's DPOTrainer, for GPUs; imported only where a run asks for it.

TRL gets the same token ids in the same order, the same reference, optimiser, learning rates and clipping, and the
adapter that it trains is saved as ours is. What differs is the batching: each pair is two rows with a prompt of their
own. The device is the one that transformers' Trainer finds; several take a process each (`trl_processes.py`).
"""

import copy
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from selfdev.factory.memory import is_checkpointed
from selfdev.factory.optimiser import Moments, kept_moments, optimiser
from selfdev.factory.packing import Model
from selfdev.factory.refinement import (
    Diverged,
    Losses,
    Outcome,
    Preference,
    Report,
    Step,
    diverged,
    saturated,
)
from selfdev.settings import RefinementSettings


class _OnTokens(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on a dataset that has token ids already; TRL would tokenise text."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class _Diary(TrainerCallback):  # type: ignore[misc]
    """Notes each step's terms, ends a round that has saturated, and gives up one that has diverged."""

    def __init__(self, batches: Sequence[Sequence[Preference]], settings: RefinementSettings, tick: Report):
        self.batches, self.settings, self.tick = batches, settings, tick
        self.terms: list[tuple[float, float, float]] = []
        self.stopped: int | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise Diverged(diverged("the loss", self.settings))
        batch = self.batches[len(self.terms) % len(self.batches)]
        # TRL logs the mean over the pairs of the chosen program's summed log-probability.
        nll = -logs["logps/chosen"] * len(batch) / sum(len(p.chosen) for p in batch)
        margin = logs["rewards/margins"] / self.settings.beta
        self.terms.append((logs["loss"] - self.settings.supervised * nll, margin, nll))
        self.tick(len(self.terms))
        if saturated([margin for _, margin, _ in self.terms], self.settings.stop_margin):
            self.stopped = len(self.terms)
            control.should_training_stop = True

    def outcome(self) -> Outcome:
        epochs = [self.terms[i : i + len(self.batches)] for i in range(0, len(self.terms), len(self.batches))]
        means = [[sum(column) / len(epoch) for column in zip(*epoch, strict=True)] for epoch in epochs]
        return Outcome([Losses(*each) for each in means], self.stopped)


def refine_with_trl(
    model: Model,
    reference: PreTrainedModel | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    steps: Sequence[Step],
    settings: RefinementSettings,
    *,
    flip_rate: float = 0.0,
    pairs_a_pass: int | None = None,
    moments: Moments | None = None,
    tick: Report = lambda step: None,
) -> Outcome:
    """Train those weights of a model in place that ask for a gradient: an adapter's, or all.

    Args:
        model: the factory, with an adapter to be trained or to be trained as a whole.
        reference: what it is held to: a model, or the folder of an adapter that stands in the place of the one that is
            trained; None: the factory without one.
        tokenizer: the factory's.
        steps: their pairs are taken in this order, `settings.pairs_a_step` at a time, the last ones left out that
            `settings.devices` cannot share. With several devices each has a process, which calls this with the same.
        settings: losses, learning rate, epochs.
        flip_rate: TRL's `label_smoothing`; see `losses.robust`.
        pairs_a_pass: of one process, a divisor of its share of every step; gradients are added up. None, with one
            device: all at once.
        moments: with which an earlier round has ended, where the optimiser goes on.
        tick: called after each optimiser step with how many are done.

    Raises:
        Diverged: a loss or a weight is not finite.
    """
    pairs = [
        Preference(step.prompt, step.completions[chosen], step.completions[rejected])
        for step in steps
        for chosen, rejected in step.pairs
    ]
    pairs = pairs[: len(pairs) - len(pairs) % settings.devices]
    at_once = pairs_a_pass or settings.pairs_a_step // settings.devices
    batches = [pairs[i : i + settings.pairs_a_step] for i in range(0, len(pairs), settings.pairs_a_step)]
    rows = {
        "prompt_ids": [list(p.prompt) for p in pairs],
        "chosen_ids": [list(p.chosen) for p in pairs],
        "rejected_ids": [list(p.rejected) for p in pairs],
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    diary = _Diary(batches, settings, tick)
    imitating = settings.supervised > 0
    optimizer, schedule = optimiser(model, settings, settings.epochs * len(batches), moments)
    with tempfile.TemporaryDirectory() as scratch, _streams_left_alone(model.device):
        trainer = _OnTokens(
            model=model,
            ref_model=None if isinstance(reference, Path) else reference,
            args=DPOConfig(
                output_dir=scratch,
                loss_type=[settings.loss, *(["sft"] if imitating else [])],
                loss_weights=[1.0, *([settings.supervised] if imitating else [])],
                label_smoothing=flip_rate if settings.loss == "robust" else 0.0,
                beta=settings.beta,
                max_length=None,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=settings.pairs_a_step // (at_once * settings.devices),
                gradient_checkpointing=is_checkpointed(model),
                use_cpu=model.device.type == "cpu",
                train_sampling_strategy="sequential",
                num_train_epochs=settings.epochs,
                max_grad_norm=1.0,
                bf16=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(rows),
            data_collator=DataCollatorForPreference(
                pad_token_id=0
            ),  # masked, and not every tokenizer has one
            processing_class=copy.deepcopy(tokenizer),  # TRL sets its padding
            callbacks=[diary],
            optimizers=(optimizer, schedule),
        )
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            # TRL's copy of the adapter as it is now, with what was imitated before.
            model.delete_adapter("ref")
        if isinstance(reference, Path):
            model.load_adapter(str(reference), "ref", torch_device=str(model.device))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if isinstance(reference, Path):
            model.delete_adapter("ref")
    if not all(torch.isfinite(each).all() for each in trained):
        raise Diverged(diverged("a trained weight", settings))
    model.eval()
    return replace(diary.outcome(), moments=kept_moments(model, optimizer, settings))


@contextmanager
def _streams_left_alone(device: torch.device) -> Iterator[None]:
    """Transformers' Trainer seeds the global random streams, which others may be using."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
