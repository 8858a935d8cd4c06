"""What a run's archive holds, written and read as records."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from selfdev.archive.file import ArchiveError, connect, create, transaction
from selfdev.archive.outcomes import pack, pack_positions, unpack, unpack_positions
from selfdev.archive.records import Candidate, Evaluation, Iteration, Opening, Pair, Refinement, Run

CLOCKS = {"seconds", "screening", "created", "opened"}
"""Columns that tell the time, which no two runs share."""


class TestSealed(RuntimeError):
    """The test split may not be opened now."""

    __test__ = False  # not a test class, whatever pytest thinks of its name


class Archive:
    """One run's database. Made by `create` or `open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._db = connection
        self._db.row_factory = sqlite3.Row

    @classmethod
    def create(cls, path: Path, run: Run) -> "Archive":
        """Start the archive of a new run.

        Raises:
            ArchiveError: there is one already, or the disk is full.
        """
        first = [
            1,
            run.name,
            run.preset,
            run.seed,
            run.status,
            _json(run.config),
            _json(run.facts),
            run.created,
            0.0,
        ]
        return cls(path, create(path, first))

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> "Archive":
        """Open an existing archive.

        Raises:
            ArchiveError: there is none, it is corrupt, or a newer version wrote it.
        """
        return cls(path, connect(path, read_only=read_only))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> AbstractContextManager[None]:
        """What is written within it is committed together or not at all."""
        return transaction(self._db)

    # --- the run

    @property
    def run(self) -> Run:
        """The run's own record."""
        row = dict(self._db.execute("SELECT * FROM run").fetchone())
        row.pop("id")
        return Run(**row | {"config": json.loads(row["config"]), "facts": json.loads(row["facts"])})

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Insist on what the run stands on; the order counts, since programs see experts in theirs.

        Raises:
            ArchiveError: something has changed since the run began; the message names it.
        """
        before = self.run.facts
        for key in before:
            if _json(before[key]) != _json(facts.get(key)):
                raise ArchiveError(
                    f"{key} has changed since the run began, from {before[key]!r} to {facts.get(key)!r}; a run goes on "
                    "with what it began with: put that back, or start a new run"
                )

    def set_config(self, config: Mapping[str, Any]) -> None:
        """Go on under a changed config, complete, as JSON values."""
        with self.transaction():
            self._db.execute("UPDATE run SET config = ?", (_json(config),))

    def add_seconds(self, seconds: float) -> None:
        """Count time towards the run."""
        with self.transaction():
            self._db.execute("UPDATE run SET seconds = seconds + ?", (seconds,))

    def set_status(self, status: str) -> None:
        """Move the run on: `running`, `verdict`, `done`."""
        with self.transaction():
            self._db.execute("UPDATE run SET status = ?", (status,))

    # --- questions

    def set_questions(self, split: str, questions: Iterable[tuple[str, str]]) -> None:
        """Fix the order of a split's questions: (content hash, group) each.

        Raises:
            ArchiveError: the split is archived already with other questions.
        """
        rows = [(split, i, question, group) for i, (question, group) in enumerate(questions)]
        before = self._db.execute(
            "SELECT * FROM question WHERE split = ? ORDER BY position", (split,)
        ).fetchall()
        if before:
            if [tuple(row) for row in before] != rows:
                raise ArchiveError(
                    f"the {split} questions are not those that this run began with; the task has changed since: "
                    "use the version of selfdev that began the run"
                )
            return
        with self.transaction():
            self._db.executemany("INSERT INTO question VALUES (?, ?, ?, ?)", rows)

    def questions(self, split: str) -> list[str]:
        """The content hash of every question of a split, in order."""
        rows = self._db.execute("SELECT question FROM question WHERE split = ? ORDER BY position", (split,))
        return [row[0] for row in rows]

    def groups(self, split: str) -> list[str]:
        """The group of every question of a split, in order."""
        rows = self._db.execute("SELECT grp FROM question WHERE split = ? ORDER BY position", (split,))
        return [row[0] for row in rows]

    def groups_of(self, evaluation: Evaluation) -> list[str]:
        """The group of every question that an evaluation asked, in the order of its outcomes."""
        groups = self.groups(evaluation.split)
        return groups if evaluation.asked is None else [groups[position] for position in evaluation.asked]

    # --- what the factory wrote

    def add_written(
        self, iteration: Iteration, candidates: Sequence[Candidate], scored: Sequence[Evaluation] = ()
    ) -> None:
        """Archive all programs of one iteration of one arm, with what is known of them so far."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO iteration VALUES (?, ?, ?, ?, ?)",
                (
                    iteration.arm,
                    iteration.iteration,
                    iteration.temperature,
                    json.dumps(iteration.prompts),
                    iteration.seconds,
                ),
            )
            self._add_candidates(candidates)
            for evaluation in scored:
                self._add_evaluation(evaluation)

    def keep_programs(self, candidates: Sequence[Candidate]) -> None:
        """Archive programs that another run wrote; those that are there already stay as they are."""
        with self.transaction():
            self._add_candidates([c for c in candidates if self.candidate(c.name) is None])

    def _add_candidates(self, candidates: Sequence[Candidate]) -> None:
        for c in candidates:
            self._db.execute(
                "INSERT INTO candidate (name, arm, iteration, number, prompt, text, tokens, log_prob, finished, "
                "source, status, failure, error, canonical, behaviour, nearest, distance, seconds, screening, "
                "log_probs) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(c.name, c.arm, c.iteration, c.number, c.prompt, c.text),
                    np.asarray(c.tokens, dtype=np.int32).tobytes(),
                    *(c.log_prob, int(c.finished), c.source, c.status, c.failure, c.error),
                    *(c.canonical, c.behaviour, c.nearest, c.distance, c.seconds, c.screening),
                    None if c.log_probs is None else np.asarray(c.log_probs, dtype=np.float32).tobytes(),
                ),
            )

    def iterations(self, arm: str | None = None) -> list[Iteration]:
        """The iterations whose programs are written, in order."""
        rows = self._db.execute(
            "SELECT * FROM iteration WHERE ? IS NULL OR arm = ? ORDER BY iteration, arm", (arm, arm)
        )
        return [Iteration(**dict(row) | {"prompts": tuple(json.loads(row["prompts"]))}) for row in rows]

    def iteration(self, arm: str, number: int) -> Iteration | None:
        """One iteration of an arm, from 0, or None before it is written."""
        return next((each for each in self.iterations(arm) if each.iteration == number), None)

    def candidates(self, arm: str | None = None, iteration: int | None = None) -> list[Candidate]:
        """Candidates in the order in which they were written; of one arm or iteration if given."""
        rows = self._db.execute(
            "SELECT * FROM candidate WHERE (?1 IS NULL OR arm = ?1) AND (?2 IS NULL OR iteration = ?2) "
            "ORDER BY arm, iteration, number",
            (arm, iteration),
        )
        return [_candidate(row) for row in rows]

    def candidate(self, name: str) -> Candidate | None:
        """The candidate of that name, or None."""
        row = self._db.execute("SELECT * FROM candidate WHERE name = ?", (name,)).fetchone()
        return None if row is None else _candidate(row)

    def set_screened(self, candidate: Candidate, evaluation: Evaluation | None = None) -> None:
        """Archive what screening, and with it the evaluation if there was one, said of a candidate.

        A candidate that fails later, when it is asked more, is set once more.
        """
        if candidate.status is None:
            raise ValueError(f"candidate {candidate.name} has no status")
        with self.transaction():
            self._db.execute(
                "UPDATE candidate SET status = ?, failure = ?, error = ?, canonical = ?, behaviour = ?, nearest = ?, "
                "distance = ?, screening = ? WHERE name = ?",
                (
                    *(candidate.status, candidate.failure, candidate.error, candidate.canonical),
                    *(candidate.behaviour, candidate.nearest, candidate.distance),
                    *(candidate.screening, candidate.name),
                ),
            )
            if evaluation is not None:
                self._add_evaluation(evaluation, instead=True)

    # --- scores

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Archive one evaluation."""
        with self.transaction():
            self._add_evaluation(evaluation)

    def extend_evaluation(self, evaluation: Evaluation) -> None:
        """Replace a candidate's evaluation by one that rests on more questions, in a race that goes on."""
        with self.transaction():
            self._add_evaluation(evaluation, instead=True)

    def _add_evaluation(self, e: Evaluation, *, instead: bool = False) -> None:
        outcomes, graded = pack(e.outcomes)
        row = {
            "kind": e.kind,
            "subject": e.subject,
            "number": e.number,
            "split": e.split,
            "parameters": _json(e.parameters),
            "score": e.score,
            "outcomes": outcomes,
            "graded": graded,
            "questions": e.questions,
            "failure": e.failure,
            "seconds": e.seconds,
            "asked": pack_positions(e.asked),
            "first_questions": e.first_questions,
            "first_score": e.first_score,
        }
        marks = ", ".join("?" * len(row))
        self._db.execute(
            f"INSERT {'OR REPLACE ' if instead else ''}INTO evaluation ({', '.join(row)}) VALUES ({marks})",
            tuple(row.values()),
        )

    def evaluations(
        self, kind: str | None = None, subject: str | None = None, split: str = "development"
    ) -> list[Evaluation]:
        """Evaluations on one split, in the order of kind, subject and number."""
        rows = self._db.execute(
            "SELECT * FROM evaluation WHERE split = ?3 AND (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR subject = ?2) "
            "ORDER BY kind, subject, number",
            (kind, subject, split),
        )
        return [_evaluation(row) for row in rows]

    # --- what is learned

    def add_pairs(self, arm: str, iteration: int, pairs: Sequence[Pair]) -> None:
        """Archive the preference pairs of one iteration."""
        with self.transaction():
            self._db.executemany(
                "INSERT INTO pair VALUES (?, ?, ?, ?, ?, ?)",
                [(arm, iteration, i, p.chosen, p.rejected, p.reason) for i, p in enumerate(pairs)],
            )

    def pairs(self, arm: str, iteration: int) -> list[Pair]:
        """The preference pairs of one iteration, in order."""
        rows = self._db.execute(
            "SELECT chosen, rejected, reason FROM pair WHERE arm = ? AND iteration = ? ORDER BY position",
            (arm, iteration),
        )
        return [Pair(*row) for row in rows]

    def add_refinement(self, refinement: Refinement) -> None:
        """Archive one round of training, after its adapter is on the disk."""
        r = refinement
        with self.transaction():
            self._db.execute(
                "INSERT INTO refinement VALUES (?, ?, ?, ?, ?)",
                (r.arm, r.iteration, r.adapter, _json(r.facts), r.seconds),
            )

    def refinements(self, arm: str) -> list[Refinement]:
        """The rounds of training of one arm, in order."""
        rows = self._db.execute("SELECT * FROM refinement WHERE arm = ? ORDER BY iteration", (arm,))
        return [Refinement(**dict(row) | {"facts": json.loads(row["facts"])}) for row in rows]

    def refinement(self, arm: str, iteration: int) -> Refinement | None:
        """The round of training after an iteration, or None where there was none yet."""
        return next((each for each in self.refinements(arm) if each.iteration == iteration), None)

    # --- the sealed test split and the verdict

    def opened(self, task_name: str) -> None:
        """Record that the test split is opened; the seal of `selfdev.evaluation.tasks`.

        A verdict that was cut off may open it again, and the archive then shows both openings. An opening after
        `reopen` is marked, and keeps the result that stood before it.

        Raises:
            TestSealed: the last iteration is not over, or the verdict has been reached.
        """
        status = self.run.status
        if status != "verdict":
            over = "its verdict has been reached" if status == "done" else "its last iteration is not over"
            raise TestSealed(f"the test split of task '{task_name}' is sealed for this run: {over}")
        with self.transaction():
            self._db.execute(
                "INSERT INTO test_opening (task, opened, again, before) "
                "VALUES (?, ?, (SELECT count(result) FROM verdict), (SELECT result FROM verdict))",
                (task_name, datetime.now(UTC).isoformat(timespec="seconds")),
            )

    def check_reached(self) -> None:
        """Raise ArchiveError unless a verdict has been reached, which `reopen` can take back."""
        if self.verdict() is None:
            raise ArchiveError(
                f"{self.path.parent} has no verdict yet, so there is nothing to measure again; leave --again out"
            )

    def reopen(self) -> None:
        """Take back a verdict, so that everybody is measured on the test split again.

        Raises:
            ArchiveError: there is no verdict yet.
        """
        self.check_reached()
        if self.run.status == "done":  # else it was taken back before, and the measuring was cut off
            with self.transaction():
                self._db.execute("DELETE FROM evaluation WHERE split = 'test'")
                self._db.execute("UPDATE run SET status = 'verdict'")

    def openings(self) -> list[Opening]:
        """The openings of the test split, in order."""
        rows = map(dict, self._db.execute("SELECT * FROM test_opening ORDER BY number"))
        return [Opening(row["opened"], bool(row.get("again")), _result(row.get("before"))) for row in rows]

    def fix_verdict(self, fixed: Mapping[str, Any]) -> None:
        """Write down, before the test split is opened, what the headline will compare. The first one stays."""
        with self.transaction():
            self._db.execute("INSERT OR IGNORE INTO verdict VALUES (1, ?, NULL)", (_json(fixed),))

    def set_verdict(self, result: Mapping[str, Any]) -> None:
        """Archive the verdict's result and end the run."""
        with self.transaction():
            self._db.execute("UPDATE verdict SET result = ?", (_json(result),))
            self._db.execute("UPDATE run SET status = 'done'")

    def fixed(self) -> dict[str, Any] | None:
        """What the headline compares; None before it is fixed."""
        row = self._db.execute("SELECT fixed FROM verdict").fetchone()
        return None if row is None else _result(row[0])

    def verdict(self) -> dict[str, Any] | None:
        """What came out; None until then."""
        row = self._db.execute("SELECT result FROM verdict").fetchone()
        return None if row is None else _result(row[0])

    # --- sameness

    def digest(self) -> str:
        """A hash of all that is archived but the clock and how often a cut-off verdict opened the test split."""
        content = hashlib.sha256()
        tables = self._db.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
        ).fetchall()
        for (table,) in tables:
            if table == "test_opening":
                continue
            columns = [row["name"] for row in self._db.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(column for column in columns if column not in CLOCKS)
            for row in self._db.execute(f"SELECT {kept} FROM {table} ORDER BY {kept}"):
                content.update(repr(tuple(row)).encode())
        return content.hexdigest()


def _json(value: Any) -> str:
    # Keys keep their order: that of the experts is the order in which programs see them.
    return json.dumps(value)


def _result(text: str | None) -> dict[str, Any] | None:
    return json.loads(text) if text else None


def _candidate(row: sqlite3.Row) -> Candidate:
    known = dict(row)
    tokens = tuple(np.frombuffer(known["tokens"], dtype=np.int32).tolist())
    if (told := known.get("log_probs")) is not None:
        known["log_probs"] = tuple(np.frombuffer(told, dtype=np.float32).tolist())
    return Candidate(**known | {"tokens": tokens, "finished": bool(known["finished"])})


def _evaluation(row: sqlite3.Row) -> Evaluation:
    known = dict(row)
    outcomes = unpack(known.pop("outcomes"), bool(known.pop("graded", False)), known["questions"])
    asked = unpack_positions(known.pop("asked", None))
    return Evaluation(
        **known | {"outcomes": outcomes, "asked": asked, "parameters": json.loads(known["parameters"])}
    )
