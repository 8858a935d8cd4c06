"""A folder that is written aside, under a name that begins with a dot, and renamed once it is complete.

What is interrupted or fails leaves nothing behind; what is killed leaves the dot folder.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfdev.errors import UserError
from selfdev.merging.job import existing_folder


def check_out(out: Path) -> None:
    """Raise UserError unless `out` is free: not there, or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"'{out}' exists already and is not overwritten; choose another --out, or remove it")
    if not existing_folder(out).is_dir():
        raise UserError(
            f"'{existing_folder(out)}' is a file, and '{out}' would lie in it; choose another --out"
        )


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror}; choose another --out") from error
    try:
        yield aside
        # All is on the disk before the name is, or a power failure could leave a folder that looks whole.
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        aside.rename(out)  # over an empty folder too
        _flush(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold a folder's entries or a file's bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
