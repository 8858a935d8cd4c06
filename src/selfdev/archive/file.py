"""The archive's file: SQLite in WAL mode, one writer, any number of readers; its formats, old and new."""

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

NAME = "archive.db"
"""Of the file in a run's folder."""
APPLICATION_ID = 0x5E1FDE0
VERSION = 6
ADDED = {
    2: (
        "ALTER TABLE evaluation ADD COLUMN graded INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE evaluation ADD COLUMN asked BLOB",
        "ALTER TABLE evaluation ADD COLUMN first_questions INTEGER",
        "ALTER TABLE evaluation ADD COLUMN first_score REAL",
    ),
    3: (
        "ALTER TABLE test_opening ADD COLUMN again INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE test_opening ADD COLUMN before TEXT",
    ),
    4: ("ALTER TABLE candidate ADD COLUMN seconds REAL",),
    5: ("ALTER TABLE candidate ADD COLUMN screening REAL",),
    6: ("ALTER TABLE candidate ADD COLUMN log_probs BLOB",),
}
"""What each version added to the one before it."""
SPACE_NEEDED = 200 * 1024**2
"""Bytes that must be free before a run starts."""


class ArchiveError(RuntimeError):
    """The archive cannot be used: absent, corrupt, from a newer version, or in the way."""


def create(path: Path, run: Sequence[Any]) -> sqlite3.Connection:
    """Make the file of a new run.

    Args:
        path: where.
        run: the columns of its only row of the table `run`.

    Raises:
        ArchiveError: there is one already, or the disk is full.
    """
    if path.exists():
        raise ArchiveError(
            f"{path} exists: `selfdev resume {path.parent}` goes on with it; or choose another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < SPACE_NEEDED:
        raise ArchiveError(
            f"{path.parent}: {free / 1e6:.0f} MB are free and a run needs {SPACE_NEEDED / 1e6:.0f} MB; "
            "make room or choose another --out"
        )
    db = _connect(path)
    # All or nothing: a kill in here leaves a file without tables, which `connect` calls unfinished.
    schema = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    db.executescript(f"BEGIN;{schema}COMMIT;")
    with transaction(db):
        db.execute(f"INSERT INTO run VALUES ({', '.join('?' * len(run))})", run)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")
    return db


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a run's file; one in an older format is brought up to date, unless it is only read.

    Raises:
        ArchiveError: there is none, it cannot be opened, it is corrupt, or a newer version wrote it.
    """
    if not path.is_file():
        raise ArchiveError(f"{path.parent} holds no run: there is no {path.name}; `selfdev run` starts one")
    try:
        db = _connect(path, read_only=read_only)
        identity, version = (
            db.execute(f"PRAGMA {key}").fetchone()[0] for key in ("application_id", "user_version")
        )
        if identity == APPLICATION_ID and version > VERSION:
            raise ArchiveError(
                f"{path} has format {version} and this selfdev reads up to {VERSION}; install a newer selfdev"
            )
        if identity != APPLICATION_ID:
            raise ArchiveError(
                f"{path} is no archive of a run, or its creation was cut off; remove it and run anew"
            )
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
    except sqlite3.OperationalError as error:
        raise ArchiveError(
            f"{path} cannot be opened ({error}); wait for who is at work on it, or copy the folder to where it may be "
            "read and written"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ArchiveError(
            f"{path} is corrupt ({error}); restore it from a copy, or start a new run with another --out"
        ) from error
    if not read_only:
        _bring_up(db, version)
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """What is written within it is committed together or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _bring_up(db: sqlite3.Connection, version: int) -> None:
    with transaction(db):
        for step in range(version + 1, VERSION + 1):
            for statement in ADDED[step]:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    mode = "mode=ro" if read_only else "mode=rwc"
    if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        mode = "immutable=1"  # else SQLite wants to make files beside it even to read one that was written with a log
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=30)
    if not read_only:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    return db
