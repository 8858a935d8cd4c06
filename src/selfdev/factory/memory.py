"""How much memory a round of training or a batch of sampling takes, reckoned before it starts.

What a pass keeps for its backward pass, or for the tokens after it, is not guessed from the architecture: a short pass
of the model itself tells it. In training it grows with the tokens, since attention keeps no matrix
(`packed_attention.py`). Beside it stand the gradients and the optimiser's state, and one chunk of vocabulary logits. It
is an estimate: what the system frees late and what other programs take meanwhile is not in it, nor what each process
of several devices takes for Python and its libraries.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.decoder import kept_a_token
from selfdev.factory.packing import Model, completion_states, output_weight
from selfdev.factory.vocabulary import CHUNK
from selfdev.settings import RefinementSettings

log = logging.getLogger(__name__)

SHARE = 0.9
"""Of the free memory that a round may plan with."""

TRANSIENT = 1.6
"""What a pass takes at its peak, times what it keeps for its backward pass.

The rest is gradients on their way and holes in the heap; measured with SmolLM2-135M, three steps of 965 tokens: 1.4.
"""

_CONTROL_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_MEASURED = 128
"""Tokens of the pass that is measured."""

_TILE = 1 << 15
"""Words of the vocabulary whose logits TRL has at once, of each token."""

_TILES = {"cuda": 1, "cpu": 9}
"""So many times; what has no kernel of its own for that is as a CPU, of which 8.2 were measured with TRL 1.16."""

_DRAWN_FROM = 3
"""Copies of a batch's logits that a step of sampling may hold: the model's, in float32, those that a grammar allows."""


class Packed(Protocol):
    """Completions that stand behind one prompt in a step."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        ...


@dataclass(frozen=True)
class Footprint:
    """Bytes that a round takes beside the model's weights, which are loaded already.

    Attributes:
        fixed: gradients, AdamW's two moments, one chunk of logits.
        a_token: of a pass, for each of its tokens.
    """

    fixed: int
    a_token: float

    def of(self, tokens: int) -> int:
        """Bytes with passes of so many tokens."""
        return self.fixed + math.ceil(self.a_token * tokens)

    def tokens(self, free: int) -> int:
        """The most tokens of a pass with which a round takes no more than `free` bytes; 0 where none does."""
        return max(0, int((free - self.fixed) / self.a_token))


def _packed(model: Model, ids: list[int]) -> None:
    """A pass as ours: half a prompt, and one completion."""
    half = len(ids) // 2
    completion_states(model, ids[:half], [ids[half:]])


def _body(model: Model, ids: list[int]) -> None:
    """A pass up to the hidden states."""
    _plain(model).base_model(torch.tensor([ids], device=model.device), use_cache=False)


def _checkpointed(model: Model, ids: list[int]) -> None:
    """The same as TRL passes: of a layer its input alone is kept, and all else is made anew in the backward pass."""
    plain, was = _plain(model), [(module, module.training) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newer names are not in all of transformers 5
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # or nothing would be checkpointed
    try:
        _body(model, ids)
    finally:
        for module, training in was:
            module.training = training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            plain.gradient_checkpointing_disable()
        plain.disable_input_require_grads()  # what the first line asks for where there is an adapter


def _plain(model: Model) -> PreTrainedModel:
    found: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def is_checkpointed(model: Model) -> bool:
    """Whether the layers of a model can do without what they keep for the backward pass, and make it anew."""
    return bool(_plain(model).supports_gradient_checkpointing)


def footprint(model: Model, kl: bool) -> Footprint:
    """Measure a model that is to be trained.

    Args:
        model: with its adapter, or all of whose weights ask for a gradient.
        kl: whether the loss has a KL term, which needs the logits of model and reference at once.
    """
    logits = CHUNK * len(output_weight(model)) * 4 * (5 if kl else 2)
    return Footprint(3 * _trained(model) + logits, TRANSIENT * _kept(model, _packed) / _MEASURED)


def footprint_of_trl(model: Model) -> Footprint:
    """The same of a model that TRL is to train, which keeps of a layer its input, and has few logits at once."""
    kept = _kept(model, _body) / _MEASURED
    if is_checkpointed(model):
        layers = _plain(model).config.get_text_config().num_hidden_layers
        kept = _kept(model, _checkpointed) / _MEASURED + TRANSIENT * kept / layers
    else:
        kept *= TRANSIENT
    words, width = output_weight(model).shape
    head = 4 * (3 * width + _TILES.get(model.device.type, _TILES["cpu"]) * min(words, _TILE))
    of_head = 4 * words * width if output_weight(model).requires_grad else 0
    return Footprint(3 * _trained(model) + of_head, kept + head)


def _trained(model: Model) -> int:
    """Bytes of the weights that ask for a gradient."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def fitting_pass(
    model: Model,
    steps: Sequence[Packed],
    settings: RefinementSettings,
    free: int | None,
    what: str = "refinement",
) -> int | None:
    """How many tokens a pass of this round may hold.

    Args:
        model: see `footprint`.
        steps: of the round, of preferences and of imitation.
        settings: `tokens_a_pass` is never exceeded.
        free: bytes, see `available`; None where nobody knows.
        what: the section of the config that asks for the training and has the adapter's rank.

    Returns:
        What `packing.passes` takes: `settings.tokens_a_pass` where memory allows for it, less where it does not.

    Raises:
        SelfdevError: not even one completion with its prompt fits.
    """
    wanted = max(len(step.prompt) + sum(step.lengths) for step in steps)
    least = max(len(step.prompt) + max(step.lengths) for step in steps)
    if settings.tokens_a_pass is not None:
        wanted = max(least, min(wanted, settings.tokens_a_pass))
    if free is None:
        return settings.tokens_a_pass
    needs, free = footprint(model, settings.kl > 0), int(SHARE * free)
    fits = needs.tokens(free)
    if fits < least:
        raise SelfdevError(
            f"{what}: training on one program of {least} tokens, prompt included, takes about "
            f"{needs.of(least) / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory may be taken; free some, or "
            + (f"take a lower {what}.rank" if settings.train == "lora" else f"set {what}.train: lora")
        )
    if fits >= wanted:
        return settings.tokens_a_pass
    log.warning(
        "%s: a pass of %d tokens takes about %.1f GB and %.1f GB may be taken; passes of at most %d tokens instead",
        what,
        wanted,
        needs.of(wanted) / 1e9,
        free / 1e9,
        fits,
    )
    return fits


def fitting_pairs(
    model: Model,
    steps: Sequence[Packed],
    pairs: int,
    settings: RefinementSettings,
    free: int | None,
    other: bool,
) -> int:
    """How many pairs a process of TRL may have in a pass: its share of every step, or an equal part of that which fits.

    Args:
        model: see `footprint`.
        steps: of the round. To TRL a pair is two rows, as long as the longest of all.
        pairs: of the round.
        settings: `pairs_a_step`, `devices`, and `tokens_a_pass`, which is exceeded where one pair has more.
        free: bytes, see `available`; None where nobody knows. On a CPU all processes share them.
        other: whether the reference is a second model.

    Raises:
        SelfdevError: not even one pair fits.
    """
    shares = [settings.pairs_a_step, pairs % settings.pairs_a_step // settings.devices * settings.devices]
    share = math.gcd(*shares) // settings.devices
    pair = 2 * max(len(step.prompt) + max(step.lengths) for step in steps)
    most = max(1, (settings.tokens_a_pass or pair * share) // pair)
    if free is not None:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if settings.devices > 1:  # the model makes room for those of the processes
            free = (free + weights) // (settings.devices if model.device.type == "cpu" else 1) - weights
        needs = footprint_of_trl(model)
        # Processes exchange gradients in a copy of them.
        more = weights * other + _trained(model) * (settings.devices > 1)
        needs = Footprint(needs.fixed + more, needs.a_token)
        free = int(SHARE * free)
        fits = needs.tokens(free) // pair
        if fits < 1:
            raise SelfdevError(
                f"refinement: training on one pair of {pair} tokens, prompts included, takes TRL up to "
                f"{needs.of(pair) / 1e9:.1f} GB and {max(0, free) / 1e9:.1f} GB of memory may be taken"
                + (" for each of the devices" if settings.devices > 1 else "")
                + "; free some, or set refinement.backend: own, which packs prompts"
            )
        most = min(most, fits)
    return max(part for part in range(1, min(most, share) + 1) if share % part == 0)


def check_batch(
    model: PreTrainedModel, prompts: Sequence[int], rows: int, tokens: int, free: int | None, own: int = 0
) -> None:
    """Make sure that so many programs can be sampled at once.

    The batch is not made smaller by itself, since what is written depends on it by rounding.

    Args:
        model: that samples, loaded already.
        prompts: the length of each, in tokens.
        rows: programs at once.
        tokens: the longest that one may become.
        free: bytes, see `available`; None where nobody knows.
        own: tokens of a prompt that each program may have for itself, as in a repair turn.

    Raises:
        UserError: they do not fit into the free memory.
    """
    if free is None:
        return
    kept = kept_a_token(model)
    a_row = (tokens + own) * kept + _DRAWN_FROM * 4 * model.config.get_text_config().vocab_size
    free = int(SHARE * free)
    left = free - sum(prompts) * kept
    if rows * a_row <= left:
        return
    fits = max(0, left // a_row)
    raise UserError(
        f"factory.batch: sampling {rows} programs at once, each of up to {tokens} tokens, takes about "
        f"{(rows * a_row + sum(prompts) * kept) / 1e9:.1f} GB beside the model and {free / 1e9:.1f} GB of memory may "
        "be taken; free some, take a smaller factory.max_new_tokens, or "
        + (f"set factory.batch to {fits} or less" if fits else "a smaller factory.model")
    )


def available(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None if unknown.

    Of a GPU of CUDA's that is what its driver and torch's own cache have; elsewhere what is left of the machine, its
    control group and its own limit.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [bytes_ for bytes_ in (_machine(), _control_group(), _own_limit()) if bytes_ is not None]
    return min(found, default=None)


def _machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group() -> int | None:
    """What version 2 control groups leave, the process's own and those above it."""
    names = [line.removeprefix("0::") for line in _lines(_OWN_GROUP) if line.startswith("0::")]
    root, left = _CONTROL_GROUPS, []
    for name in names:
        own = root / name.lstrip("/")
        for folder in [own, *own.parents]:
            limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
            if limit and used and limit[0] != "max":
                # Pages of files that nobody has looked at lately, such as read weights, are given back for the asking.
                idle = [
                    line.split()[1]
                    for line in _lines(folder / "memory.stat")
                    if line.startswith("inactive_file ")
                ]
                left.append(int(limit[0]) - int(used[0]) + sum(map(int, idle)))
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


def _kept(model: Model, forward: Callable[[Model, list[int]], None]) -> int:
    """Bytes that a pass of `_MEASURED` tokens keeps for its backward pass, the weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node keeps would keep the graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, [0] * _MEASURED)
    return sum(kept.values())
