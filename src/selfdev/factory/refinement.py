"""One DPO round: the factory learns from pairs of programs (Rafailov et al. 2023, arXiv 2305.18290).

Training is on the sampled token ids, never on text that is tokenised again. The programs of one step share one
packed prompt (`packing.py`), and a program that stands in several pairs of a step is computed once. The
reference is the factory without the new adapter, computed in the same packs, so that rounding cancels out.

What is guaranteed: the same pairs, settings and seed give the same adapter on the same machine with the same number
of threads. A loss that is not finite ends the round with an error before anything is saved.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.factory.packing import completion_log_probs

Tokens = tuple[int, ...]


class Diverged(SelfdevError):
    """The loss is not a finite number; the adapter is useless."""


@dataclass(frozen=True)
class Step:
    """One optimiser step: a prompt, distinct completions of it, and pairs (chosen, rejected) of their indices."""

    prompt: Tokens
    completions: tuple[Tokens, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Losses:
    """Means over one epoch: the DPO loss, the margin of rewards / beta (nats), the supervised loss (nats a token)."""

    dpo: float
    margin: float
    supervised: float


def plan(
    pairs: Sequence[tuple[Tokens, Tokens]], prompts: Sequence[Tokens], pairs_a_step: int, seed: int
) -> list[Step]:
    """Shuffle pairs into steps; the steps take the prompts in turn.

    Args:
        pairs: token ids of (chosen, rejected).
        prompts: token ids of prompts; a pair is not tied to the prompt that it was written under.
        pairs_a_step: pairs that share one packed prompt.
        seed: of the shuffle.
    """
    order = list(pairs)
    random.Random(seed).shuffle(order)
    steps = []
    for number, start in enumerate(range(0, len(order), pairs_a_step)):
        part = order[start : start + pairs_a_step]
        distinct = list(dict.fromkeys(tokens for pair in part for tokens in pair))
        place = {tokens: i for i, tokens in enumerate(distinct)}
        indices = tuple((place[chosen], place[rejected]) for chosen, rejected in part)
        steps.append(Step(tuple(prompts[number % len(prompts)]), tuple(distinct), indices))
    return steps


def dpo_loss(gain: Tensor, pairs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The sigmoid DPO loss.

    Args:
        gain: log p_model - log p_reference of each completion, nats, shape (completions,).
        pairs: indices (chosen, rejected), shape (pairs, 2).
        beta: strength of the pull towards the reference; above 0.

    Returns:
        The mean of -log sigmoid(beta (gain_chosen - gain_rejected)), and the mean margin gain_chosen - gain_rejected.
    """
    margin = gain[pairs[:, 0]] - gain[pairs[:, 1]]
    return -F.logsigmoid(beta * margin).mean(), margin.mean()


def refine(
    model: PeftModel,
    steps: Sequence[Step],
    *,
    beta: float,
    learning_rate: float,
    epochs: int,
    supervised: float,
    tick: Callable[[int], None] = lambda step: None,
) -> list[Losses]:
    """Train the adapter in place.

    Args:
        model: the factory with a new adapter that changes nothing yet.
        steps: what `plan` made.
        beta: see `dpo_loss`.
        learning_rate: peak rate of AdamW; it warms up over the first tenth and falls linearly to zero.
        epochs: passes over the steps.
        supervised: factor on the mean negative log-likelihood of the chosen side, in nats a token, which is added to
            the loss and keeps the likelihood of working syntax up; 0 leaves it out.
        tick: called after each step and each reference pass with how many are done.

    Returns:
        The losses of each epoch.

    Raises:
        Diverged: a loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    total = epochs * len(steps)
    warm_up = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, (total - i) / max(1, total - warm_up + 1))
    )
    model.train()
    references: list[Tensor] = []
    with torch.no_grad(), model.disable_adapter():
        for step in steps:
            references.append(_summed(completion_log_probs(model, step.prompt, step.completions)))
            tick(len(references))
    history = []
    done = len(references)
    for _ in range(epochs):
        sums = torch.zeros(3)
        for step, reference in zip(steps, references, strict=True):
            log_probs = completion_log_probs(model, step.prompt, step.completions)
            pairs = torch.tensor(step.pairs, device=reference.device)
            dpo, margin = dpo_loss(_summed(log_probs) - reference, pairs, beta)
            chosen = pairs[:, 0].unique().tolist()
            nll = -torch.cat([log_probs[i] for i in chosen]).mean()
            loss = dpo + supervised * nll
            if not math.isfinite(loss.item()):
                raise Diverged(
                    f"the loss of a refinement is {loss.item()}; lower refinement.learning_rate ({learning_rate:g})"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            sums += torch.stack([dpo, margin, nll]).detach().float().cpu()
            done += 1
            tick(done)
        history.append(Losses(*(sums / len(steps)).tolist()))
    model.eval()
    return history


def _summed(log_probs: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.sum() for each in log_probs])
