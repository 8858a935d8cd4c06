"""Holding a folder against other processes; the system lets go of it however this one ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"
"""The empty file by which a folder is held."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder that exists, by its file `LOCK`, which stays.

    Raises:
        BlockingIOError: another process holds it.
    """
    with (folder / LOCK).open("a") as file:
        _lock(file.fileno())
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder; not known, and False, where the lock cannot be read."""
    try:
        with (folder / LOCK).open("rb") as file:
            _lock(file.fileno(), shared=True)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _lock(descriptor: int, *, shared: bool = False) -> None:
    """Lock a file until it is closed, or raise BlockingIOError at once."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
