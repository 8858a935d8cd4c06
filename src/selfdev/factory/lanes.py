"""Shares of the rows that are written side by side, each by a thread of its own.

A step of a small model is many small operations, which one thread does nearly as fast as two together. So on a CPU the
rows are shared out, and every lane computes on its own part of the threads. What lies in which lane follows from the
number of rows and of threads alone.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")

LEAST = 24
"""Rows at once in a lane: with fewer, the weights are read too often for what is computed with them."""


def lanes(rows: int) -> int:
    """How many lanes there are for so many rows at once."""
    return max(1, min(torch.get_num_threads(), rows // LEAST))


def in_lanes(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Neighbours together, shares as equal as can be."""
    edges = [len(items) * lane // count for lane in range(count + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(edges)]


def side_by_side(works: Sequence[Callable[[Event], None]]) -> None:
    """Do all, each on an equal part of the threads.

    Args:
        works: each is given an event, and ends early once it is set: another one has failed, or is interrupted.
    """
    stop = threading.Event()
    if len(works) == 1:
        works[0](stop)
        return

    def inferring(work: Callable[[Event], None]) -> None:
        with torch.inference_mode():  # that of the caller is its own thread's
            work(stop)

    threads = torch.get_num_threads()
    torch.set_num_threads(threads // len(works))
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            try:
                futures = [pool.submit(inferring, work) for work in works]
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)
