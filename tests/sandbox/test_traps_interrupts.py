"""Traps of Ctrl-C: whenever it comes, nothing is left running and the sandbox can be used again."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from canaries import ONE, SUM
from processes import wait_until_gone

from selfdev.sandbox import Limits, Sandbox


@contextmanager
def interrupt(function: str, *, at_call: int = 1) -> Iterator[None]:
    """A Ctrl-C that arrives as this thread enters a function of the sandbox for the n-th time."""
    calls = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_name == function and "sandbox" in frame.f_code.co_filename:
            calls += 1
            if calls == at_call:
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Turn a hang into a failure."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("function", "at_call"),
    [("_exactly", 2), ("submitted", 1), ("started", 1)],
    ids=["between an event's length and its body", "after the submission", "with the pidfd in hand"],
)
def test_an_interrupt_at_any_point_leaves_the_sandbox_usable(function: str, at_call: int) -> None:
    endless = "def merge_models(m, d):\n    while True: pass"
    with Sandbox(Limits(wall_seconds=100, cpu_seconds=100)) as own:
        first = own.pid
        with interrupt(function, at_call=at_call), pytest.raises(KeyboardInterrupt):
            own.merge(endless, ONE)
        wait_until_gone(first)  # and with it all of its children, which nobody would kill at their deadline
        with no_longer_than(60):
            assert own.merge(SUM, ONE).ok
        assert own.pid != first


def test_an_interrupted_program_ends() -> None:
    with Sandbox(Limits(wall_seconds=100, cpu_seconds=100)) as own:
        pids: list[int] = []

        def press() -> None:
            children = Path(f"/proc/{own.pid}/task/{own.pid}/children")
            while not pids:
                pids.extend(map(int, children.read_text().split()))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt), no_longer_than(60):
            own.merge("def merge_models(m, d):\n    while True: pass", ONE)
        thread.join()
        wait_until_gone(pids[0])
        assert own.merge(SUM, ONE).ok
