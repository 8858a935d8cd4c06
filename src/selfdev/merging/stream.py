"""The tensors of a merge in the order of writing, several of them made side by side.

How much lies in memory follows from the largest tensor alone: as many steps are under way as fit into what it
takes and a little more, each on a thread of its own. One that takes more than half of that has all threads.
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
from selfdev.sandbox import Context

_ROOM_BESIDE = 96 << 20
"""Bytes of task vectors and seeds that may be under way beside the largest tensor's."""

_STEPS_A_THREAD = 8
"""Steps that may be under way or wait to be written, for each thread: enough to bridge a wait for the disk."""


def steps_of(job: Job, batch_bytes: int) -> list[list[str]]:
    """Names in the order of writing, in groups whose task vectors are merged in one call.

    Args:
        job: what is merged.
        batch_bytes: of task vectors that a group may have; a larger tensor is a group of its own.
    """
    steps: list[list[str]] = []
    step: list[str] = []
    held = 0
    for name in job.order:
        size = 4 * len(job.experts) * math.prod(job.seed.shapes[name]) if name in job.chosen else 0
        if size and held and held + size > batch_bytes:
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
    """Merge all steps; gives every tensor, in order: merged ones in float32, the others as the seed stores them.

    Args:
        job: what is merged.
        algorithm: how.
        steps: what `steps_of` made.
        ahead: reads `spans_of` these steps.

    Raises:
        UserError: a checkpoint holds values that are not finite.
        SelfdevError: the algorithm fails, or makes something that is not finite.
    """
    bytes_each = 4 * (len(job.experts) + 1)
    sizes = [
        sum(bytes_each * math.prod(job.seed.shapes[name]) for name in step if name in job.chosen)
        for step in steps
    ]
    room = max(sizes) + _ROOM_BESIDE
    threads = torch.get_num_threads()

    def make(step: Sequence[str], threads: int, before: Future[list[Tensor]] | None) -> list[Tensor]:
        torch.set_num_threads(threads)  # of this thread
        batch = [_inputs(job, name) for name in step if name in job.chosen]
        if before is not None:
            wait([before])
        return _merged(job, algorithm, step, batch)

    under_way: deque[_Step] = deque()

    def is_full(size: int) -> bool:
        held = sum(each.size for each in under_way)
        return held + size > room or len(under_way) >= _STEPS_A_THREAD * threads

    try:
        with ThreadPoolExecutor(max(2, threads), thread_name_prefix="merge") as pool:
            try:
                for step, size in zip(steps, sizes, strict=True):
                    while under_way and is_full(size):
                        yield from under_way.popleft().taken()
                    ahead.next()
                    before = under_way[-1].making if under_way and not algorithm.concurrent else None
                    making = pool.submit(make, step, threads if 2 * size > room else 1, before)
                    under_way.append(_Step(step, size, making))
                while under_way:
                    yield from under_way.popleft().taken()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)  # those that begin later take over what was set last


@dataclass(frozen=True)
class _Step:
    """One that is under way: its tensors, the bytes that it takes, and what makes it."""

    names: Sequence[str]
    size: int
    making: Future[list[Tensor]]

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, each let go of once it is taken."""
        tensors = self.making.result()
        tensors.reverse()
        for name in self.names:
            yield name, tensors.pop()


def _inputs(job: Job, name: str) -> Inputs:
    """The seed's tensor and the task vectors of one parameter, in memory of their own."""
    rows = slice(job.rows.get(name))
    seed = job.seed.tensor(name)
    seed = (seed[rows] if seed.dim() else seed).to(torch.float32, copy=True)
    job.seed.release(name)
    vectors = torch.empty((len(job.experts), *seed.shape))
    for vector, expert in zip(vectors, job.experts.values(), strict=True):
        expert.task_vector(name, seed, vector)
        expert.release(name)
    if not is_finite(vectors):
        for model in (job.seed, *job.experts.values()):
            model.check_finite(name, model.tensor(name))
        raise UserError(
            f"'{name}': an expert's tensor is further from the seed's than float32 reaches; leave it out"
        )
    return Inputs(tuple(job.experts), vectors, Context(seed, name, layer_of(name), job.layers))


def _merged(job: Job, algorithm: Algorithm, step: Sequence[str], batch: list[Inputs]) -> list[Tensor]:
    """The tensors of a step, in order."""
    vectors = algorithm.merge(batch) if batch else []
    seeds = [each.context.seed for each in batch]
    batch.clear()  # of the task vectors nothing is needed any more
    vectors.reverse()
    seeds.reverse()
    tensors = []
    for name in step:
        if name not in job.chosen:
            tensors.append(job.seed.tensor(name))
            continue
        merged = seeds.pop().add_(vectors.pop())  # in float32, and rounded once
        if not is_finite(merged):
            raise SelfdevError(
                f"the algorithm makes '{name}' not finite; choose other parameters or another algorithm"
            )
        if name in job.rows:
            kept = job.seed.tensor(name)[job.rows[name] :]
            merged = torch.cat([merged, kept.to(torch.float32)])
        tensors.append(merged)
    return tensors
