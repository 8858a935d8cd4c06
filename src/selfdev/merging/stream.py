"""The tensors of a merge in the order of writing, several of them made side by side.

How much lies in memory follows from the largest tensor alone: as many steps are under way as fit into what it
takes and a little more, each on a thread of its own. One that takes more than half of that has all threads, unless
its algorithm is entrywise: then a tensor is merged a cache full at a time, and what it takes is what is written of it.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdev.errors import SelfdevError, UserError
from selfdev.merging.algorithm import Algorithm, Inputs
from selfdev.merging.job import Job
from selfdev.merging.read_ahead import ReadAhead, Span
from selfdev.merging.reader import is_finite
from selfdev.merging.targets import layer_of
from selfdev.merging.writer import Planned
from selfdev.models.weights import TYPES
from selfdev.sandbox import Context

_ROOM_BESIDE = 96 << 20
"""Bytes that steps may take beside the largest one's."""

_BLOCK = 1 << 16
"""Entries of each model that are merged at a time where parts can be: all that is made of them stays in the cache."""

_STRETCH = 1 << 21
"""Entries of a mapped tensor after which its pages are released, since to do so after each part takes longer."""

_STEPS_A_THREAD = 8
"""Steps that may be under way or wait to be written, for each thread: enough to bridge a wait for the disk."""


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
                    alone = 2 * size > room and not algorithm.entrywise
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
    parts = [part for name in step for part in _parts(job, algorithm, name)]
    calls = [[part] for part in parts] if algorithm.entrywise else [parts] if parts else []
    for call in calls:
        batch = [_inputs(job, part) for part in call]
        if before is not None:
            wait([before])
        vectors = algorithm.merge(batch)
        seeds = [each.context.seed for each in batch]
        batch.clear()  # of the task vectors nothing is needed any more
        for part in reversed(call):
            _put(job, part, seeds.pop(), vectors.pop(), tensors[part.name])
    return list(tensors.values())


def _merged_entries(job: Job, name: str) -> int:
    """How many entries of a tensor are merged, which are the first ones."""
    return math.prod(_merged_shape(job, name)) if name in job.chosen else 0


def _merged_shape(job: Job, name: str) -> tuple[int, ...]:
    shape = job.seed.shapes[name]
    return (job.rows[name], *shape[1:]) if name in job.rows else shape


def _parts(job: Job, algorithm: Algorithm, name: str) -> Iterator[_Part]:
    """What of a tensor is merged in one call: a cache full if the algorithm allows it, or all."""
    if name not in job.chosen:
        return
    whole = _Part(name, _merged_shape(job, name))
    entries = math.prod(whole.shape)
    models = (job.seed, *job.experts.values())
    if entries <= _BLOCK or not algorithm.entrywise or not all(model.in_parts(name) for model in models):
        yield whole
        return
    for begin in range(0, entries, _BLOCK):
        end = min(begin + _BLOCK, entries)
        yield _Part(name, (end - begin,), begin, end == entries or end % _STRETCH == 0)


def _float32_bytes(job: Job, algorithm: Algorithm, name: str) -> int:
    """Bytes of the seed's and the task vectors' entries that lie in memory while a tensor is merged."""
    first = next(_parts(job, algorithm, name), None)
    return 0 if first is None else 4 * (len(job.experts) + 1) * math.prod(first.shape)


def _kept(job: Job, name: str) -> Tensor:
    """A tensor of which everything that is not merged, be it rows or all, is the seed's."""
    planned, stored = job.planned(name), job.seed.tensor(name).flatten()
    typed = planned.dtype in TYPES  # of others there are the bytes
    shape, dtype = (planned.shape, TYPES[planned.dtype]) if typed else (stored.shape, stored.dtype)
    tensor = torch.empty(shape, dtype=dtype)
    first = _merged_entries(job, name)
    kept = tensor.view(-1)[first:].copy_(stored[first:])
    if kept.dtype != stored.dtype and not is_finite(kept):
        raise _beyond(planned)
    job.seed.release(name)
    return tensor


def _inputs(job: Job, part: _Part) -> Inputs:
    """The seed's entries and the task vectors of a part, in memory of their own."""
    name = part.name
    seed = job.seed.entries(name, part.shape, part.begin).to(torch.float32, copy=True)
    if part.releases:
        job.seed.release(name)
    vectors = torch.empty((len(job.experts), *part.shape))
    for vector, expert in zip(vectors, job.experts.values(), strict=True):
        expert.task_vector(name, seed, vector, part.begin)
        if part.releases:
            expert.release(name)
    if not is_finite(vectors):
        for model in (job.seed, *job.experts.values()):
            model.check_finite(name, model.tensor(name))
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
