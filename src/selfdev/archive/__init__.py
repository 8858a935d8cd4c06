"""The run's database: everything that was written, run, scored, preferred and learned."""

from selfdev.archive.database import Archive, TestSealed
from selfdev.archive.file import NAME as ARCHIVE
from selfdev.archive.file import ArchiveError
from selfdev.archive.records import (
    DISTANCE,
    FACTOR,
    ORDER,
    Candidate,
    Evaluation,
    Iteration,
    Opening,
    Pair,
    Refinement,
    Run,
    in_nats,
)

__all__ = [
    "ARCHIVE",
    "DISTANCE",
    "FACTOR",
    "ORDER",
    "Archive",
    "ArchiveError",
    "Candidate",
    "Evaluation",
    "Iteration",
    "Opening",
    "Pair",
    "Refinement",
    "Run",
    "TestSealed",
    "in_nats",
]
