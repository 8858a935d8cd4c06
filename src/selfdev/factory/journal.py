"""What a server was asked and what it answered, so that nothing is paid for twice.

A request is written down before it is sent, with the most that it may cost, and settled once its answer is there.
Every step is on the disk before the next one begins. What a killed process had in flight stays open, and counts at
its most: the server may have billed it. The same question is answered from here ever after.
"""

import os
import secrets
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS request (
    id INTEGER PRIMARY KEY,
    question TEXT NOT NULL,           -- hash of all that decides the answer
    tokens_in INTEGER NOT NULL,       -- as the server counted them; before the answer, the most they may be
    tokens_out INTEGER NOT NULL,
    answer TEXT                       -- JSON; NULL as long as none has come
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS answered ON request (question) WHERE answer IS NOT NULL;
CREATE TABLE IF NOT EXISTS journal (tag TEXT NOT NULL) STRICT;
"""


_SPENT = "SELECT coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) FROM request"

JOURNAL = "written.db"
"""Of the file in a run's folder."""


@dataclass(frozen=True)
class Usage:
    """Tokens that a server has read and written."""

    tokens_in: int
    tokens_out: int

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.tokens_in + self.tokens_out

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)


class Answer(BaseModel):
    """What a server wrote.

    Attributes:
        text: without special tokens.
        finished: False if the limit on new tokens ended it.
        tokens: the sampled ids, the stopping token included; None where the server does not tell them.
        log_probs: of each token, at temperature 1, in nats; None where the server does not tell them.
        tokens_in: length of the prompt as the server counted it; None where it does not tell.
        tokens_out: the same of what was written.
        seconds: on the clock, from the request to the end of the answer.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    finished: bool
    tokens: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float | None = None


class Journal:
    """The journal of one run: an SQLite file in its folder.

    Attributes:
        tag: eight hexadecimal digits that no other run has, which mark what this run leaves on a server.
    """

    def __init__(self, path: Path):
        """Open a journal, or begin one."""
        # The loop that samples may run in another thread than the one that opens; never two at once.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")  # an answer survives a power cut too
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        if (row := self._db.execute("SELECT tag FROM journal").fetchone()) is None:
            row = (secrets.token_hex(4),)
            self._db.execute("INSERT INTO journal VALUES (?)", row)
        self.tag = str(row[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def ask(self, question: str, most: Usage) -> int:
        """Write down a request that is about to be sent.

        Args:
            question: its hash.
            most: what it may cost at most.

        Returns:
            The number under which it is settled.
        """
        row = self._db.execute(
            "INSERT INTO request (question, tokens_in, tokens_out) VALUES (?, ?, ?) RETURNING id",
            (question, most.tokens_in, most.tokens_out),
        ).fetchone()
        return int(row[0])

    def settle(self, number: int, answer: Answer) -> None:
        """Write down an answer, and what it cost; what the server does not count stays at its most."""
        self._db.execute(
            "UPDATE request SET answer = ?, tokens_in = coalesce(?, tokens_in), tokens_out = coalesce(?, tokens_out) "
            "WHERE id = ?",
            (answer.model_dump_json(), answer.tokens_in, answer.tokens_out, number),
        )

    def forget(self, number: int) -> None:
        """Strike a request that the server did not carry out."""
        self._db.execute("DELETE FROM request WHERE id = ?", (number,))

    def answers(self, questions: Iterable[str]) -> dict[str, Answer]:
        """The answers that are here, by question."""
        found = {}
        for question in questions:
            row = self._db.execute(
                "SELECT answer FROM request WHERE question = ? AND answer IS NOT NULL", (question,)
            ).fetchone()
            if row is not None:
                found[question] = Answer.model_validate_json(row[0])
        return found

    @property
    def has_answers(self) -> bool:
        """Whether the run has had any answer."""
        return self._db.execute("SELECT 1 FROM request WHERE answer IS NOT NULL").fetchone() is not None

    def spent(self) -> Usage:
        """What the run has cost so far, requests without an answer at their most."""
        return Usage(*self._db.execute(_SPENT).fetchone())


def spent_in(folder: Path) -> Usage | None:
    """What the run in a folder has cost so far; None where no server wrote, or where it cannot be read."""
    path = folder / JOURNAL
    if not path.is_file():
        return None
    try:
        # One that was killed in a step of its account is mended by whoever opens it and may write.
        mode = "rw" if os.access(path, os.W_OK) and os.access(folder, os.W_OK) else "ro"
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as db:
            return Usage(*db.execute(_SPENT).fetchone())
    except sqlite3.OperationalError:
        return None
