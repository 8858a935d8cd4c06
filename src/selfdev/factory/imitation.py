"""Supervised training on programs: the factory learns to write what has been found good.

Before the first iteration that are worked examples (`warm_start.py`), after an iteration the programs that work and are
new: rejection sampling, then fine-tuning (Yuan et al. 2023, arXiv 2308.01825). A model that can hardly write a program
that runs learns that from imitation, and from preferences what is better; so imitation comes first, where both are on.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from selfdev.factory.packing import Model, completion_log_probs, passes
from selfdev.factory.refinement import Diverged

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Lesson:
    """One optimiser step: token ids of a prompt, and of the completions that are imitated after it."""

    prompt: Tokens
    completions: tuple[Tokens, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion) for completion in self.completions]


def lessons(
    programs: Iterable[tuple[Tokens, Tokens]],
    passes: int,
    programs_a_step: int,
    seed: int,
    rehearsal: int = 0,
    known: Mapping[Tokens, Sequence[Tokens]] | None = None,
) -> list[Lesson]:
    """Put programs of one prompt together into steps, in an order that is shuffled anew for each pass.

    Args:
        programs: prompt and completion; one that comes twice counts once.
        passes: how often each is imitated.
        programs_a_step: the most of them that share one packed prompt.
        seed: of the shuffles.
        rehearsal: completions of `known` that each step imitates as well.
        known: for each prompt, completions that it may rehearse.
    """
    draw = random.Random(seed)
    by_prompt: dict[Tokens, list[Tokens]] = {}
    for prompt, completion in dict.fromkeys(programs):
        by_prompt.setdefault(prompt, []).append(completion)
    steps = []
    for _ in range(passes):
        once = []
        for prompt, completions in by_prompt.items():
            draw.shuffle(completions)
            for start in range(0, len(completions), programs_a_step):
                rehearsed = draw.sample(known[prompt], rehearsal) if known else []
                once.append(Lesson(prompt, (*completions[start : start + programs_a_step], *rehearsed)))
        draw.shuffle(once)
        steps += once
    return steps


def imitate(
    model: Model,
    steps: Sequence[Lesson],
    learning_rate: float,
    tick: Callable[[int, float], None] = lambda step, loss: None,
    tokens_a_pass: int | None = None,
    rate: str = "refinement.imitation.learning_rate",
) -> list[float]:
    """Train those weights of a model in place that ask for a gradient: an adapter's, or all.

    Args:
        model: the factory.
        steps: what is imitated, in order.
        learning_rate: peak rate of AdamW; it falls linearly to a tenth.
        tick: called after each step with its number from 0 and its loss.
        tokens_a_pass: see `packing.passes`; the gradient does not depend on it, up to rounding.
        rate: the setting that `learning_rate` is from, for the message of an error.

    Returns:
        The loss of each step, in nats a token.

    Raises:
        Diverged: a loss or a weight is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=len(steps))
    model.eval()  # see `refinement.refine`
    losses = []
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for part in passes(len(step.prompt), step.lengths, tokens_a_pass):
            completions = [step.completions[i] for i in part]
            found = torch.cat(completion_log_probs(model, step.prompt, completions))
            loss = -found.sum() / sum(step.lengths)
            loss.backward()
            losses[-1] += loss.item()
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"the loss of an imitation is not a finite number; lower {rate} ({learning_rate:g})"
            )
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        tick(number, losses[-1])
    if not all(torch.isfinite(each).all() for each in trained):
        raise Diverged(f"a weight of an imitation is not a finite number; lower {rate} ({learning_rate:g})")
    return losses
