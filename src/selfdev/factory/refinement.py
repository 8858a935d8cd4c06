"""One DPO round: the factory learns from pairs of programs (Rafailov et al. 2023, arXiv 2305.18290).

Training is on the sampled token ids, never on text that is tokenised again. The programs of one step share one
packed prompt (`packing.py`), and a program that stands in several pairs of a step is computed once. The
reference is the factory without the new adapter, computed in the same packs, so that rounding cancels out.

What is guaranteed: the same pairs, settings and seed give the same adapter on the same machine with the same number
of threads. A loss that is not finite ends the round with an error before anything is saved.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
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
class Preference:
    """Token ids of a prompt, of the program that is to become more likely after it, and of one that is not."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        prompt: token ids.
        completions: distinct ones.
        pairs: (chosen, rejected), indices of completions.
        rehearsed: completions that are imitated alone, in no pair: indices.
    """

    prompt: Tokens
    completions: tuple[Tokens, ...]
    pairs: tuple[tuple[int, int], ...]
    rehearsed: tuple[int, ...] = ()

    @property
    def imitated(self) -> list[int]:
        """The completions under the supervised loss: the chosen, each once, and the rehearsed."""
        return sorted({chosen for chosen, _ in self.pairs} | set(self.rehearsed))


@dataclass(frozen=True)
class Losses:
    """Means over one epoch: the DPO loss, the margin of rewards / beta (nats), the supervised loss (nats a token)."""

    dpo: float
    margin: float
    supervised: float


def plan(
    preferences: Sequence[Preference],
    pairs_a_step: int,
    seed: int,
    rehearsal: int = 0,
    known: Mapping[Tokens, Sequence[Tokens]] | None = None,
) -> list[Step]:
    """Put pairs of one prompt together into steps, in a shuffled order.

    Args:
        preferences: each is trained under its own prompt.
        pairs_a_step: the most that share one packed prompt.
        seed: of the shuffles.
        rehearsal: completions of `known` that each step imitates as well.
        known: for each prompt, completions that it may rehearse, dealt out as cards.
    """
    draw = random.Random(seed)
    by_prompt: dict[Tokens, list[Preference]] = {}
    for preference in preferences:
        by_prompt.setdefault(preference.prompt, []).append(preference)
    steps = []
    for prompt, same in by_prompt.items():
        draw.shuffle(same)
        deck: list[Tokens] = []
        for start in range(0, len(same), pairs_a_step):
            part = same[start : start + pairs_a_step]
            if len(deck) < rehearsal and known is not None:
                deck = draw.sample(known[prompt], len(known[prompt]))
            rehearsed = [deck.pop() for _ in range(rehearsal)]
            distinct = dict.fromkeys([each for p in part for each in (p.chosen, p.rejected)] + rehearsed)
            place = {completion: i for i, completion in enumerate(distinct)}
            indices = tuple((place[p.chosen], place[p.rejected]) for p in part)
            steps.append(Step(prompt, tuple(distinct), indices, tuple(place[each] for each in rehearsed)))
    draw.shuffle(steps)
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
        supervised: factor on the mean negative log-likelihood of the imitated completions, in nats a token, which is
            added to the loss and keeps the likelihood of working syntax up; 0 leaves it out.
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
            nll = -torch.cat([log_probs[i] for i in step.imitated]).mean()
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
