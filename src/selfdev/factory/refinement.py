"""One round of preference training: the factory learns from pairs of programs.

Training is on the sampled token ids, never on text that is tokenised again. The programs of one step share one
packed prompt (`packing.py`), and a program that stands in several pairs of a step is computed once. The reference does
not change, so it computes a program once for all steps. What is minimised is in `losses.py`.

A step that does not fit into memory is split into passes. Its loss couples all its programs, so their
log-probabilities are computed first, without a graph; the loss's gradient with respect to them is then carried into one
pass after the other. The gradient is that of one large pass, at the price of one more forward pass.

What is guaranteed: the same pairs, settings and seed give the same adapter on the same machine with the same number
of threads. A loss or a weight that is not finite ends the round with an error before anything is saved.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.factory.losses import preference_loss
from selfdev.factory.optimiser import Moments, kept_moments, optimiser
from selfdev.factory.packing import Model, completion_states, output_bias, output_weight, passes
from selfdev.factory.vocabulary import divergence, token_log_probs
from selfdev.settings import RefinementSettings

Tokens = tuple[int, ...]
Report = Callable[[int], None]

UNTRAINED = 4
"""How much larger a pass of the reference may be than one that trains, which keeps some ten tensors a layer."""

STOP_WINDOW = 4
"""Steps whose mean margin must pass `refinement.stop_margin`: a single step has a handful of pairs."""


class Diverged(SelfdevError):
    """The loss or a weight is not a finite number; the adapter is useless."""


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion) for completion in self.completions]


@dataclass(frozen=True)
class Reference:
    """What the reference makes of a step.

    Attributes:
        log_probs: of each completion, summed over its tokens, nats, shape (completions,).
        hidden: what its next-token distributions are made from, shape (tokens, width), in the CPU's memory; None where
            no KL term asks.
    """

    log_probs: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Losses:
    """Means over the steps of one epoch.

    Attributes:
        dpo: the preference loss, whichever it is.
        margin: of rewards / beta, nats.
        supervised: negative log-likelihood of the imitated completions, nats a token.
        kl: divergence from the reference, nats a token; None where it was not computed.
    """

    dpo: float
    margin: float
    supervised: float
    kl: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a round came to.

    Attributes:
        losses: of each epoch.
        stopped: the step (from 1) after which its margin ended it early.
        moments: see `optimiser.kept_moments`.
    """

    losses: list[Losses]
    stopped: int | None = None
    moments: Moments | None = None


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


def consult(
    model: Model,
    steps: Sequence[Step],
    settings: RefinementSettings,
    tokens_a_pass: int | None = None,
    tick: Report = lambda step: None,
    *,
    whole: bool = False,
) -> list[Reference]:
    """What the reference makes of every step; each program is computed once, and few passes repeat its prompt.

    Args:
        model: the reference; of one that carries an adapter, the model without it.
        steps: what `plan` made.
        settings: whether there is a KL term.
        tokens_a_pass: of the passes that train, see `packing.passes`; those of the reference hold `UNTRAINED` times as
            many, or as the longest step has.
        tick: called after each pass with how many steps it amounts to.
        whole: an adapter that it carries counts too.
    """
    asked: dict[Tokens, dict[Tokens, None]] = {}
    for step in steps:
        asked.setdefault(step.prompt, {}).update(dict.fromkeys(step.completions))
    longest = max((len(step.prompt) + sum(step.lengths) for step in steps), default=0)
    total, done = sum(map(len, asked.values())), 0
    hidden: dict[tuple[Tokens, Tokens], Tensor] = {}
    log_probs: dict[tuple[Tokens, Tokens], Tensor] = {}
    bare = isinstance(model, PeftModel) and not whole
    with torch.no_grad(), model.disable_adapter() if bare else nullcontext():
        for prompt, distinct in asked.items():
            completions = list(distinct)
            lengths = [len(completion) for completion in completions]
            for part in passes(len(prompt), lengths, UNTRAINED * (tokens_a_pass or longest)):
                some = [completions[i] for i in part]
                states, found = _forward(model, prompt, some)
                sizes = [len(completion) for completion in some]
                for completion, state, each in zip(
                    some, states.split(sizes), found.split(sizes), strict=True
                ):
                    log_probs[prompt, completion] = each.sum()
                    if settings.kl:
                        hidden[prompt, completion] = state.cpu()  # of all steps, which a GPU need not hold
                done += len(some)
                tick(len(steps) * done // total)
    return [
        Reference(
            torch.stack([log_probs[step.prompt, each] for each in step.completions]),
            torch.cat([hidden[step.prompt, each] for each in step.completions]) if settings.kl else None,
        )
        for step in steps
    ]


def refine(
    model: Model,
    steps: Sequence[Step],
    references: Sequence[Reference],
    settings: RefinementSettings,
    *,
    flip_rate: float = 0.0,
    tokens_a_pass: int | None = None,
    moments: Moments | None = None,
    tick: Report = lambda step: None,
) -> Outcome:
    """Train those weights of a model in place that ask for a gradient: an adapter's, or all.

    Args:
        model: the factory, with an adapter to be trained or to be trained as a whole.
        steps: what `plan` made.
        references: what `consult` made of them.
        settings: losses, learning rate, epochs.
        flip_rate: see `losses.robust`.
        tokens_a_pass: see `packing.passes`.
        moments: with which an earlier round has ended, where the optimiser goes on; it changes them in place.
        tick: called after each step with how many are done.

    Raises:
        Diverged: a loss or a weight is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimiser(model, settings, settings.epochs * len(steps), moments)
    model.eval()  # dropout, as in GPT-2, would draw from the global random stream; TRL leaves it out as well
    history: list[Losses] = []
    margins: list[float] = []
    stopped = None
    for _ in range(settings.epochs):
        sums, done = torch.zeros(4), 0
        for step, reference in zip(steps, references, strict=True):
            optimizer.zero_grad()
            terms = backward(model, step, reference, settings, flip_rate, tokens_a_pass)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            sums += terms
            done += 1
            margins.append(terms[1].item())
            tick(len(margins))
            if saturated(margins, settings.stop_margin):
                stopped = len(margins)
                break
        dpo, margin, supervised, kl = (sums / done).tolist()
        history.append(Losses(dpo, margin, supervised, kl if settings.kl else None))
        if stopped is not None:
            break
    if not all(torch.isfinite(each).all() for each in trained):
        raise Diverged(diverged("a trained weight", settings))
    return Outcome(history, stopped, kept_moments(model, optimizer, settings))


def saturated(margins: Sequence[float], stop_margin: float | None) -> bool:
    """Whether the mean margin of the last `STOP_WINDOW` steps, in nats, has passed what is enough."""
    if stop_margin is None or len(margins) < STOP_WINDOW:
        return False
    return sum(margins[-STOP_WINDOW:]) / STOP_WINDOW > stop_margin


def diverged(what: str, settings: RefinementSettings) -> str:
    """The message of `Diverged`."""
    rate = f"{settings.learning_rate:g}"
    return f"{what} of a refinement is not a finite number; lower refinement.learning_rate ({rate})"


def _forward(model: Model, prompt: Tokens, completions: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Hidden states and log-probabilities of some completions, shapes (tokens, width) and (tokens,)."""
    hidden = completion_states(model, prompt, completions)
    target = torch.tensor([token for each in completions for token in each], device=hidden.device)
    return hidden, token_log_probs(hidden, output_weight(model), target, output_bias(model))


def backward(
    model: Model,
    step: Step,
    reference: Reference,
    settings: RefinementSettings,
    flip_rate: float,
    tokens_a_pass: int | None,
) -> Tensor:
    """Add the gradient of one step's loss to the parameters'.

    Args:
        model: the factory.
        step: whose programs.
        reference: what `consult` made of it.
        settings: the losses and their factors.
        flip_rate: see `losses.robust`.
        tokens_a_pass: see `packing.passes`; the gradient does not depend on it, up to rounding.

    Returns:
        The preference loss, the margin, the supervised loss and the divergence, shape (4,), on the CPU.

    Raises:
        Diverged: the loss is not finite.
    """
    shares = passes(len(step.prompt), step.lengths, tokens_a_pass)
    parts = [[step.completions[i] for i in share] for share in shares]
    whole = len(parts) == 1
    with torch.set_grad_enabled(whole):
        computed = [_forward(model, step.prompt, part) for part in parts]
    # The loss is differentiated with respect to the log-probabilities alone, and they with respect to the weights.
    log_probs = torch.cat([found for _, found in computed]).detach().requires_grad_()
    gain = _summed(log_probs, step) - reference.log_probs
    pairs = torch.tensor(step.pairs, device=gain.device)
    lengths = torch.tensor(step.lengths, device=gain.device)
    dpo, margin = preference_loss(
        settings.loss, gain, lengths, pairs, beta=settings.beta, flip_rate=flip_rate
    )
    each = log_probs.split(step.lengths)
    nll = -torch.cat([each[i] for i in step.imitated]).mean()
    loss = dpo + settings.supervised * nll
    if not math.isfinite(loss.item()):
        raise Diverged(diverged("the loss", settings))
    loss.backward()
    assert log_probs.grad is not None
    kl, weight, bias, start = torch.zeros(()), output_weight(model), output_bias(model), 0
    for part, before in zip(parts, computed, strict=True):
        hidden, found = before if whole else _forward(model, step.prompt, part)
        rows = slice(start, start := start + len(found))
        roots, slopes = [found], [log_probs.grad[rows]]
        if reference.hidden is not None:
            its = reference.hidden[rows].to(hidden.device)
            apart = divergence(hidden, its, weight, settings.kl_direction, bias).sum()
            kl += apart.detach().cpu() / len(log_probs)
            roots.append(apart)
            slopes.append(torch.full_like(apart, settings.kl / len(log_probs)))
        torch.autograd.backward(roots, slopes)
    return torch.stack([term.detach().float().cpu() for term in (dpo, margin, nll, kl)])


def _summed(log_probs: Tensor, step: Step) -> Tensor:
    return torch.stack([each.sum() for each in log_probs.split(step.lengths)])
