"""The tensors of a merge in the order of writing, several of them made side by side.

How much lies in memory follows from the largest tensor alone: as many steps are under way as fit into what it
takes and a little more, each on a thread of its own. One that takes more than half of that has all threads, unless
its algorithm takes parts: then a tensor is merged a cache full at a time, and what it takes is what is written of it.
Methods that need to know something of the whole, such as a threshold, look through its parts before.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdev.algorithms.library.blocks import Stack, in_blocks
from selfdev.errors import SelfdevError, UserError
from selfdev.merging.algorithm import Algorithm, Inputs, MergePart
from selfdev.merging.job import Job
from selfdev.merging.read_ahead import ReadAhead, Span
from selfdev.merging.reader import is_finite
from selfdev.merging.targets import layer_of
from selfdev.merging.writer import Planned
from selfdev.models.weights import TYPES
from selfdev.sandbox import Context

_ROOM_BESIDE = 96 << 20
"""Bytes that steps may take beside the largest one's."""

_BLOCK = 1 << 17
"""Entries of each model that are merged at a time where parts can be: all that is made of them stays in the cache."""

_STRETCH = 1 << 21
"""Entries of a mapped tensor after which its pages are released, since to do so after each part takes longer."""

_STEPS_A_THREAD = 32
"""Steps that may be under way or wait to be written, for each thread: enough to bridge a wait for the disk, and
to go on beside a large tensor that is merged in parts by one thread."""


def steps_of(job: Job, batch_bytes: int) -> list[list[str]]:
    """Names in the order of writing, in groups whose task vectors are merged in one call.

    Args:
        job: what is merged.
        batch_bytes: of task vectors, and of what is not merged, that a group may have; a larger tensor is a group of
            its own.
    """
    steps: list[list[str]] = []
    step: list[str] = []
    held = 0
    for name in job.order:
        size = (
            4 * len(job.experts) * _merged_entries(job, name)
            if name in job.chosen
            else job.planned(name).size
        )
        if step and held + size > batch_bytes:
            steps.append(step)
            step, held = [], 0
        step.append(name)
        held += size
    return [*steps, step]


def spans_of(job: Job, step: Sequence[str]) -> list[Span]:
    """What is read for a step."""
    spans = []
    for name in step:
        for model in (job.seed, *(job.experts.values() if name in job.chosen else ())):
            entry = model.entry(name)
            spans.append((model.path(name), entry.begin, entry.end))
    return spans


def merged_tensors(
    job: Job, algorithm: Algorithm, steps: Sequence[list[str]], ahead: ReadAhead
) -> Iterator[tuple[str, Tensor]]:
    """Merge all steps; gives every tensor, in order, of the type in which it is written.

    Args:
        job: what is merged.
        algorithm: how.
        steps: what `steps_of` made.
        ahead: reads `spans_of` these steps.

    Raises:
        UserError: a checkpoint holds values that are not finite.
        SelfdevError: the algorithm fails, or makes something that is not finite or beyond what the type reaches.
    """
    written = [sum(job.planned(name).size for name in step) for step in steps]
    sizes = [
        size + sum(_float32_bytes(job, algorithm, name) for name in step)
        for step, size in zip(steps, written, strict=True)
    ]
    room = max(sizes) + _ROOM_BESIDE
    threads = torch.get_num_threads()

    def make(step: Sequence[str], threads: int, before: Future[list[Tensor]] | None) -> list[Tensor]:
        torch.set_num_threads(threads)  # of this thread
        return _tensors(job, algorithm, step, before)

    under_way: deque[_Step] = deque()

    def is_full(size: int) -> bool:
        held = sum(each.size for each in under_way)
        return held + size > room or len(under_way) >= _STEPS_A_THREAD * threads

    try:
        with ThreadPoolExecutor(max(2, threads), thread_name_prefix="merge") as pool:
            try:
                for step, size, left in zip(steps, sizes, written, strict=True):
                    while under_way and (under_way[0].making.done() or is_full(size)):
                        yield from under_way.popleft().taken()
                    ahead.next()
                    before = under_way[-1].making if under_way and not algorithm.concurrent else None
                    alone = 2 * size > room and not all(_looks(job, algorithm, name) for name in step)
                    making = pool.submit(make, step, threads if alone else 1, before)
                    under_way.append(_Step(step, size, left, making))
                while under_way:
                    yield from under_way.popleft().taken()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)  # those that begin later take over what was set last


@dataclass(frozen=True)
class _Step:
    """One that is under way: its tensors, the bytes that making it takes, those that it leaves, and what makes it."""

    names: Sequence[str]
    making_bytes: int
    made_bytes: int
    making: Future[list[Tensor]]

    @property
    def size(self) -> int:
        """Bytes that it takes now."""
        return self.made_bytes if self.making.done() else self.making_bytes

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, each let go of once it is taken."""
        tensors = self.making.result()
        tensors.reverse()
        for name in self.names:
            yield name, tensors.pop()


@dataclass(frozen=True)
class _Part:
    """What is merged of a parameter at a time.

    Attributes:
        name: of the parameter.
        shape: the parameter's own, or the first rows that all have; flat if it is a part of these.
        begin: its first entry, in the order of storage.
        releases: whether the pages of the parameter, as far as it has been read, are let go of.
    """

    name: str
    shape: tuple[int, ...]
    begin: int = 0
    releases: bool = True


def _tensors(
    job: Job, algorithm: Algorithm, step: Sequence[str], before: Future[list[Tensor]] | None
) -> list[Tensor]:
    """The tensors of a step, in order, in memory of their own; the algorithm is called once `before` is done."""
    tensors = {name: _kept(job, name) for name in step}
    whole: list[_Part] = []
    for name in step:
        if looks := _looks(job, algorithm, name):
            _merge_in_parts(job, name, looks, tensors[name])
        elif name in job.chosen:
            whole.append(_Part(name, _merged_shape(job, name)))
    if whole:
        batch = [_inputs(job, part) for part in whole]
        if before is not None:
            wait([before])
        vectors = algorithm.merge(batch)
        seeds = [each.context.seed for each in batch]
        batch.clear()  # of the task vectors nothing is needed any more
        for part in reversed(whole):
            _put(job, part, seeds.pop(), vectors.pop(), tensors[part.name])
    return list(tensors.values())


def _merge_in_parts(job: Job, name: str, looks: Callable[[Stack], MergePart], tensor: Tensor) -> None:
    """Merge a tensor a cache full at a time, after a look at its task vectors."""
    merge, entries = looks(_stack(job, name)), _merged_entries(job, name)
    for span in in_blocks(entries, _BLOCK):
        part = _Part(name, (span.stop - span.start,), span.start, _is_released(span.stop, entries))
        inputs = _inputs(job, part)
        seed = inputs.context.seed
        _put(job, part, seed, merge(inputs.task_vectors, seed), tensor)


def _stack(job: Job, name: str) -> Stack:
    """The task vectors of a tensor, made where they are looked at."""
    total = _merged_entries(job, name)

    def part(entries: slice) -> Tensor:
        begin, end, step = entries.indices(total)
        seed = torch.empty(len(range(begin, end, step)))
        seed.copy_(job.seed.entries(name, seed.shape, begin, step))
        vectors = torch.empty(len(job.experts), len(seed))
        for vector, expert in zip(vectors, job.experts.values(), strict=True):
            expert.task_vector(name, seed, vector, begin, step)
        if step > 1 or _is_released(end, total):
            _let_go(job, name, 0)  # it is read once more
        return vectors

    return Stack(len(job.experts), total, part)


def _let_go(job: Job, name: str, end: int) -> None:
    """Let go of the pages of a tensor and, where the models are large, of the system's up to an entry."""
    for model in (job.seed, *job.experts.values()):
        model.release(name)
        if job.passing and end:
            model.forget(name, end)


def _is_released(end: int, entries: int) -> bool:
    """Whether a tensor's pages are let go of when its parts up to this entry have been read."""
    return end == entries or end % _STRETCH == 0


def _merged_entries(job: Job, name: str) -> int:
    """How many entries of a tensor are merged, which are the first ones."""
    return math.prod(_merged_shape(job, name)) if name in job.chosen else 0


def _merged_shape(job: Job, name: str) -> tuple[int, ...]:
    shape = job.seed.shapes[name]
    return (job.rows[name], *shape[1:]) if name in job.rows else shape


def _looks(job: Job, algorithm: Algorithm, name: str) -> Callable[[Stack], MergePart] | None:
    """What merges a tensor in parts after a look at it; None if it is merged whole, or not at all."""
    models = (job.seed, *job.experts.values())
    if _merged_entries(job, name) <= _BLOCK or not all(model.in_parts(name) for model in models):
        return None
    return algorithm.in_parts(name, job.layers)


def _float32_bytes(job: Job, algorithm: Algorithm, name: str) -> int:
    """Bytes of the seed's and the task vectors' entries that lie in memory while a tensor is merged."""
    entries = _BLOCK if _looks(job, algorithm, name) else _merged_entries(job, name)
    return 4 * (len(job.experts) + 1) * entries


def _kept(job: Job, name: str) -> Tensor:
    """A tensor of which everything that is not merged, be it rows or all, is the seed's."""
    planned, stored = job.planned(name), job.seed.tensor(name).flatten()
    typed = planned.dtype in TYPES  # of others there are the bytes
    shape, dtype = (planned.shape, TYPES[planned.dtype]) if typed else (stored.shape, stored.dtype)
    tensor = torch.empty(shape, dtype=dtype)
    first = _merged_entries(job, name)
    kept = tensor.view(-1)[first:].copy_(stored[first:])
    if kept.dtype != stored.dtype and not is_finite(kept) and is_finite(stored[first:]):
        raise _beyond(planned)
    job.seed.release(name)
    if job.passing and name not in job.chosen:
        job.seed.forget(name)
    return tensor


def _inputs(job: Job, part: _Part) -> Inputs:
    """The seed's entries and the task vectors of a part, in memory of their own."""
    name = part.name
    seed, vectors = torch.empty(part.shape), torch.empty((len(job.experts), *part.shape))
    in_parts = all(model.in_parts(name) for model in (job.seed, *job.experts.values()))
    finite = True
    # A cache full at a time: each of its steps would else go through memory.
    for span in in_blocks(seed.numel(), _BLOCK if in_parts else max(1, seed.numel())):
        whole = span.stop - span.start == seed.numel()
        own = seed if whole else seed.view(-1)[span]
        own.copy_(job.seed.entries(name, own.shape, part.begin + span.start))
        theirs = vectors if whole else vectors.view(len(vectors), -1)[:, span]
        for vector, expert in zip(theirs, job.experts.values(), strict=True):
            expert.task_vector(name, own, vector, part.begin + span.start)
        # A sum that is finite is one of finite numbers; one that is not may have been too large.
        finite = finite and (math.isfinite(theirs.sum().item()) or is_finite(theirs))
        if part.releases and _is_released(span.stop, seed.numel()):
            _let_go(job, name, part.begin + span.stop)
    if not finite:
        for model in (job.seed, *job.experts.values()):
            model.check_stored(name)
        raise UserError(
            f"'{name}': an expert's tensor is further from the seed's than float32 reaches; leave it out"
        )
    return Inputs(tuple(job.experts), vectors, Context(seed, name, layer_of(name), job.layers))


def _put(job: Job, part: _Part, seed: Tensor, vector: Tensor, tensor: Tensor) -> None:
    """Write seed plus merged task vector, added in float32 and rounded once, to their place in a tensor."""
    merged = seed.add_(vector)
    if not is_finite(merged, tensor.dtype):
        if is_finite(merged):
            raise _beyond(job.planned(part.name))
        raise SelfdevError(
            f"the algorithm makes '{part.name}' not finite; choose other parameters or another algorithm"
        )
    tensor.view(-1)[part.begin : part.begin + merged.numel()].copy_(merged.view(-1))


def _beyond(planned: Planned) -> SelfdevError:
    return SelfdevError(
        f"'{planned.name}' holds values beyond what {planned.dtype} reaches; write --dtype bf16 or fp32 instead"
    )
