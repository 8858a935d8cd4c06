"""How much memory a round of training takes, reckoned before it starts.

What a pass keeps for its backward pass is not guessed from the architecture: two short passes of the model itself tell
it. It grows with the tokens and, where attention keeps a matrix, with their square. Beside it stand the gradients and
the optimiser's state, and one chunk of vocabulary logits. It is an estimate: what the system frees late and what other
programs take meanwhile is not in it.
"""

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.factory.packing import completion_states, output_weight
from selfdev.factory.refinement import Step
from selfdev.factory.vocabulary import CHUNK
from selfdev.settings import RefinementSettings

log = logging.getLogger(__name__)

SHARE = 0.9
"""Of the free memory that a round may plan with."""

TRANSIENT = 2.2
"""What a pass takes at its peak, times what it keeps for its backward pass.

The rest is gradients on their way and holes in the heap; measured with SmolLM2-135M and 965 tokens: 2.15.
"""

_SHORT, _LONG = 64, 192
"""Tokens of the two passes that are measured."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a round takes beside the model's weights, which are loaded already.

    Attributes:
        fixed: gradients, AdamW's two moments and its scratch, one chunk of logits.
        a_token: of a pass, for each of its tokens.
        a_pair: of a pass, for each pair of its tokens.
    """

    fixed: int
    a_token: float
    a_pair: float

    def of(self, tokens: int) -> int:
        """Bytes with passes of so many tokens."""
        return self.fixed + math.ceil(self.a_token * tokens + self.a_pair * tokens**2)

    def tokens(self, free: int) -> int:
        """The most tokens of a pass with which a round takes no more than `free` bytes; 0 where none does."""
        left = free - self.fixed
        if left <= 0:
            return 0
        # The positive root of a_pair t^2 + a_token t = left, in the form that stays exact as a_pair goes to 0.
        root = math.sqrt(self.a_token**2 + 4 * self.a_pair * left)
        return int(2 * left / (self.a_token + root))


def footprint(model: PeftModel, kl: bool) -> Footprint:
    """Measure a model that is to be trained.

    Args:
        model: with its new adapter.
        kl: whether the loss has a KL term, which needs the logits of model and reference at once.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    logits = CHUNK * len(output_weight(model)) * 4 * (5 if kl else 2)
    short, long = _kept(model, _SHORT), _kept(model, _LONG)
    # kept(t) = b t + c t^2 through both points
    c = max(0.0, (long / _LONG - short / _SHORT) / (_LONG - _SHORT))
    b = long / _LONG - c * _LONG
    return Footprint(4 * trained + logits, TRANSIENT * b, TRANSIENT * c)


def fitting_pass(
    model: PeftModel, steps: Sequence[Step], settings: RefinementSettings, free: int | None = None
) -> int | None:
    """How many tokens a pass of this round may hold.

    Args:
        model: with its new adapter.
        steps: of the round.
        settings: `tokens_a_pass` is never exceeded.
        free: bytes; by default what the system says, as far as it does.

    Returns:
        What `packing.passes` takes: `settings.tokens_a_pass` where memory allows for it, less where it does not.

    Raises:
        SelfdevError: not even one completion with its prompt fits.
    """
    free = available() if free is None else free
    wanted = max(len(step.prompt) + sum(step.lengths) for step in steps)
    least = max(len(step.prompt) + max(step.lengths) for step in steps)
    if settings.tokens_a_pass is not None:
        wanted = max(least, min(wanted, settings.tokens_a_pass))
    if free is None:
        return settings.tokens_a_pass
    needs = footprint(model, settings.kl > 0)
    fits = needs.tokens(int(SHARE * free))
    if fits < least:
        raise SelfdevError(
            f"refinement: training on one program of {least} tokens, prompt included, takes about "
            f"{needs.of(least) / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; free some, or take a lower "
            "refinement.rank"
        )
    if fits >= wanted:
        return settings.tokens_a_pass
    log.warning(
        "refinement: a pass of %d tokens takes about %.1f GB and %.1f GB are free; passes of at most %d tokens instead",
        wanted,
        needs.of(wanted) / 1e9,
        free / 1e9,
        fits,
    )
    return fits


def available() -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its own limit; None if unknown."""
    found = [bytes_ for bytes_ in (_machine(), _control_group(), _own_limit()) if bytes_ is not None]
    return min(found, default=None)


def _machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group() -> int | None:
    """What version 2 control groups leave, the process's own and those above it."""
    names = [line.removeprefix("0::") for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")]
    root, left = Path("/sys/fs/cgroup"), []
    for name in names:
        own = root / name.lstrip("/")
        for folder in [own, *own.parents]:
            limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
            if limit and used and limit[0] != "max":
                left.append(int(limit[0]) - int(used[0]))
            if folder == root:
                break
    return min(left, default=None)


def _own_limit() -> int | None:
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _kept(model: PeftModel, tokens: int) -> int:
    """Bytes that a pass of so many tokens keeps for its backward pass, the weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = [0] * (tokens // 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_states(model, ids, [ids])
    return sum(kept.values())
