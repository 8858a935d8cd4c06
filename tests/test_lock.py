"""A run's folder belongs to one process at a time."""

import errno
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from selfdev.lock import held

HOLD = "import sys\nfrom pathlib import Path\nfrom selfdev.lock import held\n"
ENTER = HOLD + "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENTER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), held(tmp_path):
            pass
        other.kill()
        other.wait()
        with held(tmp_path):
            pass


def test_it_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path):
            pass


def test_windows_locks_one_byte_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for the module that Python has on Windows, with its words for "another process has it".
    locked: list[tuple[int, int]] = []

    def locking(descriptor: int, mode: int, size: int) -> None:
        if locked:
            raise OSError(errno.EACCES, "Permission denied")
        locked.append((mode, size))

    windows = ModuleType("msvcrt")
    windows.locking, windows.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setattr(sys, "platform", "win32")
    with held(tmp_path):
        assert locked == [(2, 1)]
        with pytest.raises(BlockingIOError), held(tmp_path):
            pass
