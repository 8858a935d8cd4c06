"""Interpreters of their own for tests, and what has become of a process."""

import os
import subprocess
import sys
import time
from pathlib import Path


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script that uses the sandbox in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def user_seconds(pid: int) -> float:
    """Processor time that a process has spent outside of the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def wait_until_gone(pid: int) -> None:
    """Fail if a process is still there after a while."""
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        os.sched_yield()
