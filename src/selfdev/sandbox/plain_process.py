"""Programs in plain child processes, for the unsafe mode on systems that cannot run the forkserver.

Each chunk gets an interpreter of its own, started by exec from the same scrubbed environment as the
forkserver and brought to the same state, so a program gives what it gives in the jail: chunks, seeds, warm-up
and the reading of results are the same code. Importing torch anew costs seconds for each chunk.

Holds: the deadline; resource limits as far as the system has them (`system.unsafe_notice` says how far).
    Inputs are a private copy; nothing is unpickled. Does not hold: anything else. The program is the user, and
    can write to its result file, as to every other, in ways that no program in the jail can.
"""

import contextlib
import io
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import interpreter
from .job import READY, Call, ResultLayout, chunks, write_job
from .judgement import SIGKILL, Death, judge
from .limits import Limits
from .outcome import Outcome, SandboxUnavailable
from .plain_candidate import JOB, RESULT
from .tensor_file import TensorFile

_SETUP_SECONDS = 180.0
_TERMINATED = 1  # the exit code by which Windows tells that a process was killed


def run(source: str, calls: Sequence[Call], limits: Limits, workers: int) -> list[Outcome]:
    """Run a program on all calls, at most ``workers`` chunks at once.

    Raises:
        SandboxUnavailable: where a child does not start, or cannot be limited.
    """
    processes = _Processes()
    with ThreadPoolExecutor(workers) as pool:
        chunked = [[calls[i] for i in places] for places in chunks(calls)]
        futures = [pool.submit(_run_chunk, processes, source, chunk, limits) for chunk in chunked]
        try:
            return [outcome for future in futures for outcome in future.result()]
        except BaseException:
            processes.end()  # else the pool would wait for every deadline
            raise


class _Processes:
    """All children of one batch, which an interrupt ends together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []
        self._over = False

    def start(self, command: list[str], folder: str) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._over:
                raise SandboxUnavailable("the batch was broken off")
            try:
                process = subprocess.Popen(
                    command,
                    env=interpreter.environment(),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    # A Ctrl-C on the terminal is the parent's business: POSIX, then Windows.
                    start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
            except OSError as error:
                raise SandboxUnavailable(f"a child cannot be started: {error}") from error
            self._started.append(process)
            return process

    def end(self) -> None:
        with self._lock:
            self._over = True
            for process in self._started:
                process.kill()


def _run_chunk(processes: _Processes, source: str, calls: Sequence[Call], limits: Limits) -> list[Outcome]:
    layout = ResultLayout.of(call.shape for call in calls)
    with contextlib.ExitStack() as stack:
        # Readable to this user alone.
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="selfdev-", ignore_cleanup_errors=True)
        )
        with contextlib.closing(TensorFile(io.FileIO(Path(folder, JOB), "x+"))) as job:
            write_job(job, source, calls)
        results = stack.enter_context(contextlib.closing(TensorFile(io.FileIO(Path(folder, RESULT), "x+"))))
        results.resize(layout.size)
        budgets = (limits.memory_bytes, limits.cpu_seconds, limits.wall_seconds)
        command = interpreter.command("plain_candidate", folder, *map(str, budgets))
        death = _attend(processes.start(command, folder), limits)
        results.resize(layout.size)  # nothing sealed it; what a program cut off reads as zeros
        return judge(results, layout, death, limits)


def _attend(process: "subprocess.Popen[bytes]", limits: Limits) -> Death:
    """Wait until a child has its limits, start the clock, and kill it at the deadline.

    Raises:
        SandboxUnavailable: where it dies, or is not ready in time, before the program is looked at.
    """
    assert process.stderr is not None
    impatience = threading.Timer(_SETUP_SECONDS, process.kill)
    impatience.start()
    with process.stderr as pipe:
        said = pipe.read()  # ends when the child turns to the program, or dies
    impatience.cancel()
    begin = time.monotonic()
    if not said.endswith(READY):
        process.kill()
        process.wait()
        reason = said.decode("utf-8", "replace").strip().splitlines()[-1:] or [
            f"exit code {process.returncode}"
        ]
        raise SandboxUnavailable(f"a child without a jail did not start: {reason[0]}")
    killed = False
    try:
        process.wait(min(limits.wall_seconds, threading.TIMEOUT_MAX))
    except subprocess.TimeoutExpired:
        killed = True
        process.kill()
        process.wait()
    exit_code = -SIGKILL if killed and process.returncode == _TERMINATED else process.returncode
    # Of a child that Popen waits for, nobody tells the processor time. It only matters to a program that
    # survives its SIGXCPU: here that one has crashed, where the forkserver calls it out of time.
    return Death(exit_code, 0.0, time.monotonic() - begin, killed)
