"""A folder that is written aside, under a name that begins with a dot, and renamed once it is complete.

What is interrupted or fails leaves nothing behind. What is killed leaves the dot folder, which the next merge to the
same place removes: whoever writes one holds a lock on it (flock), which ends with the process. Where a file system has
no such locks, the folder is named and stays. Machines that share a file system see each other's as far as it has them.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selfdev.disk import flush
from selfdev.errors import SelfdevError, UserError
from selfdev.merging.job import existing_folder
from selfdev.merging.writer import write_failure

_log = logging.getLogger(__name__)


def check_out(out: Path) -> None:
    """Raise UserError unless `out` is free: not there, or an empty folder."""
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        if os.path.ismount(out):
            raise UserError(f"'{out}' is a mount point, which no folder can replace; choose an --out in it")
        if out.resolve() in (here := Path.cwd(), *here.parents):
            raise UserError(
                f"'{out}' is the folder that you are in, which would be replaced; choose an --out in it"
            )
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"'{out}' exists already and is not overwritten; choose another --out, or remove it")
    if not existing_folder(out).is_dir():
        raise UserError(
            f"'{existing_folder(out)}' is a file, and '{out}' would lie in it; choose another --out"
        )


def remove_left(out: Path) -> None:
    """Remove what merges to `out` left when they were killed, and say so.

    Raises:
        UserError: another merge is writing there.
    """
    if not out.parent.is_dir():
        return
    aside = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}")
    for left in sorted(each for each in out.parent.iterdir() if aside.fullmatch(each.name)):
        try:
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # no folder, gone meanwhile, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
            _log.warning("removed '%s', which a merge left that was killed", left)
        except BlockingIOError:
            raise UserError(
                f"another merge is writing '{out}', in '{left}'; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            _log.warning(
                "'%s' was left by a merge that was killed, and stays: %s; remove it if no merge runs",
                left,
                error,
            )
        finally:
            os.close(lock)


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UserError: there is no place for it.
        SelfdevError: it cannot be brought to the disk, or to its place.
    """
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        lock = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror}; choose another --out") from error
    try:
        with suppress(OSError):  # a file system without locks; see above
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
        _put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):  # where something lies in them, `out` for one
            for parent in made:
                parent.rmdir()


def _put_in_place(aside: Path, out: Path) -> None:
    """Rename a folder, all of it on the disk before and the new name after."""
    try:
        # All is on the disk before the name is, or a power failure could leave a folder that looks whole.
        for file in aside.rglob("*"):
            flush(file)
        flush(aside)
        aside.rename(out)  # over an empty folder too
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise SelfdevError(
                f"'{out}' has come to be there during the merge and is not overwritten; choose another --out"
            ) from error
        raise SelfdevError(write_failure(error, aside)) from error
    try:
        flush(out.parent)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise SelfdevError(write_failure(error, aside)) from error
