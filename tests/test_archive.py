import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from selfdev.archive import (
    Archive,
    ArchiveError,
    Candidate,
    Evaluation,
    Iteration,
    Opening,
    Pair,
    Refinement,
    Run,
    TestSealed,
)

RUN = Run("r", "p", 1, "running", {"a": 1}, {}, "2026-01-01T00:00:00+00:00")
WRITTEN = [
    Candidate(
        "learning/1/001", "learning", 0, 0, 0, "text", (3, 1, 2), -1.5, True, "def merge_models(m, d): ..."
    ),
    Candidate(
        "learning/1/002",
        "learning",
        0,
        1,
        1,
        "\x00\ud83d",
        (),
        None,
        False,
        None,
        "failed",
        "NoFunction",
        "none",
    ),
]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    made = Archive.create(tmp_path / "run" / "archive.db", RUN)
    made.add_written(
        Iteration("learning", 0, 1.2, ("one", "two"), 3.0), [replace(c, text=c.text[:4]) for c in WRITTEN[:1]]
    )
    return made


def test_what_is_written_is_read_back(archive: Archive) -> None:
    assert archive.run == RUN
    assert archive.iterations() == [Iteration("learning", 0, 1.2, ("one", "two"), 3.0)]
    assert archive.candidates() == WRITTEN[:1]
    screened = replace(WRITTEN[0], status="new", canonical="c", behaviour=b"\x01", nearest="n", distance=0.5)
    outcomes = tuple(i % 3 == 0 for i in range(21))
    evaluation = Evaluation(
        "candidate", "learning/1/001", 0, "development", outcomes, 1 / 3, 21, {}, None, 0.1
    )
    archive.set_screened(screened, evaluation)
    assert archive.candidate("learning/1/001") == screened
    assert archive.evaluations("candidate") == [evaluation]
    archive.add_pairs("learning", 0, [Pair("learning/1/001", "learning/1/001", "score")])
    assert archive.pairs("learning", 0) == [Pair("learning/1/001", "learning/1/001", "score")]
    refinement = Refinement("learning", 0, "adapters/x", {"losses": [1.0]}, 2.0)
    archive.add_refinement(refinement)
    assert archive.refinements("learning") == [refinement]
    archive.close()
    with Archive.open(archive.path, read_only=True) as again:
        assert again.candidate("learning/1/001") == screened


def test_a_race_extends_an_evaluation_and_graded_outcomes_keep_their_values(archive: Archive) -> None:
    archive.set_questions("development", [(str(i), "xy"[i % 2]) for i in range(9)])
    first = Evaluation(
        *("candidate", "learning/1/001", 0, "development", (True, False), 0.5, 2),
        asked=(7, 2),
        first_questions=2,
        first_score=0.5,
    )
    archive.set_screened(replace(WRITTEN[0], status="new"), first)
    longer = replace(first, outcomes=(True, False, True), score=2 / 3, questions=3, asked=(7, 2, 3))
    archive.extend_evaluation(longer)
    assert archive.evaluations("candidate") == [longer]
    assert archive.groups_of(longer) == ["y", "x", "y"]
    graded = Evaluation("seed", "seed", 0, "development", (-0.25, 1 / 3, 0.0), 0.1, 3)
    archive.add_evaluation(graded)
    assert archive.evaluations("seed") == [graded]


def test_an_archive_of_the_first_format_is_read_and_brought_up_to_date(archive: Archive) -> None:
    evaluation = Evaluation("seed", "seed", 0, "development", (True, False, True), 2 / 3, 3)
    archive.add_evaluation(evaluation)
    archive.close()
    with sqlite3.connect(archive.path) as db:
        for column in ("graded", "asked", "first_questions", "first_score"):
            db.execute(f"ALTER TABLE evaluation DROP COLUMN {column}")
        for column in ("again", "before"):
            db.execute(f"ALTER TABLE test_opening DROP COLUMN {column}")
        for column in ("seconds", "screening", "log_probs"):
            db.execute(f"ALTER TABLE candidate DROP COLUMN {column}")
        db.execute("INSERT INTO test_opening (task, opened) VALUES ('nano', '2026-01-01')")
        db.execute("PRAGMA user_version = 1")
    with Archive.open(archive.path, read_only=True) as old:
        assert old.evaluations("seed") == [evaluation]
        assert old.openings() == [Opening("2026-01-01")]
        assert [c.seconds for c in old.candidates()] == [None]
    with Archive.open(archive.path) as new:
        new.keep_programs(
            [
                replace(
                    WRITTEN[0],
                    name="learning/9/001",
                    iteration=8,
                    seconds=1.5,
                    screening=0.1,
                    log_probs=(-1, -2),
                )
            ]
        )
        kept = new.candidate("learning/9/001")
        assert kept is not None
        assert (kept.seconds, kept.screening, kept.log_probs) == (1.5, 0.1, (-1.0, -2.0))
        new.add_evaluation(replace(evaluation, number=1, asked=(2, 1, 0)))
        assert [e.asked for e in new.evaluations("seed")] == [None, (2, 1, 0)]
        assert new.openings() == [Opening("2026-01-01")]
    with sqlite3.connect(archive.path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (6,)


def test_a_verdict_that_is_taken_back_is_marked_and_kept(archive: Archive) -> None:
    with pytest.raises(ArchiveError, match="has no verdict yet"):
        archive.reopen()
    archive.set_status("verdict")
    archive.opened("nano")
    archive.opened("nano")  # the first time the verdict was cut off
    archive.fix_verdict({"best": "a"})
    with pytest.raises(ArchiveError, match="has no verdict yet"):
        archive.reopen()
    on_test = Evaluation("seed", "seed", 0, "test", (True, False), 0.5, 2)
    archive.add_evaluation(on_test)
    archive.add_evaluation(replace(on_test, split="development"))
    archive.set_verdict({"headline": "first"})
    with pytest.raises(TestSealed, match="verdict has been reached"):
        archive.opened("nano")
    archive.reopen()
    assert archive.evaluations(split="test") == []
    assert len(archive.evaluations(split="development")) == 1
    archive.opened("nano")
    archive.add_evaluation(on_test)
    archive.reopen()  # cut off after its opening, it goes on with what it has
    assert archive.evaluations(split="test") == [on_test]
    archive.set_verdict({"headline": "second"})
    assert [(o.again, o.before) for o in archive.openings()] == [
        (False, None),
        (False, None),
        (True, {"headline": "first"}),
    ]
    assert archive.fixed() == {"best": "a"}
    assert archive.verdict() == {"headline": "second"}


def test_a_failure_inside_a_transaction_leaves_nothing(archive: Archive) -> None:
    before = archive.digest()
    bad = Pair("learning/1/001", "nobody", "score")
    with pytest.raises(sqlite3.IntegrityError):
        archive.add_pairs("learning", 0, [Pair("learning/1/001", "learning/1/001", "x"), bad])
    assert archive.pairs("learning", 0) == []
    assert archive.digest() == before


def test_the_digest_ignores_the_clock_and_nothing_else(archive: Archive, tmp_path: Path) -> None:
    other = Archive.create(tmp_path / "other.db", replace(RUN, created="2027"))
    other.add_written(Iteration("learning", 0, 1.2, ("one", "two"), 99.0), WRITTEN[:1])
    other.add_seconds(5.0)
    assert other.digest() == archive.digest()
    other.set_status("verdict")
    assert other.digest() != archive.digest()


def test_questions_are_fixed_once(archive: Archive) -> None:
    archive.set_questions("development", [("a", "x"), ("b", "y")])
    archive.set_questions("development", [("a", "x"), ("b", "y")])
    assert archive.groups("development") == ["x", "y"]
    with pytest.raises(ArchiveError, match="the task has changed"):
        archive.set_questions("development", [("b", "y"), ("a", "x")])


def test_facts_are_insisted_on_in_their_order(tmp_path: Path) -> None:
    facts = {"weights": "abc", "experts": {"a": "1", "b": "2"}}
    archive = Archive.create(tmp_path / "run" / "archive.db", replace(RUN, facts=facts))
    archive.check_facts(facts)
    archive.check_facts(facts | {"more": 1})
    with pytest.raises(ArchiveError, match="weights has changed"):
        archive.check_facts(facts | {"weights": "abd"})
    with pytest.raises(ArchiveError, match="experts has changed"):
        archive.check_facts(facts | {"experts": {"b": "2", "a": "1"}})
    archive.close()


def test_one_is_read_from_a_folder_in_which_nobody_may_write(archive: Archive) -> None:
    """Such as another user's, with none of the files that SQLite keeps beside it while it is written."""
    archive.set_questions("development", [("q1", "add")])
    archive.close()
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "archive.db"
        shutil.copy(archive.path, kept)
        kept.chmod(0o444)
        Path(folder).chmod(0o555)
        as_root = os.getuid() == 0  # who may write everywhere
        if as_root:
            os.setresuid(65534, 65534, 0)
        try:
            with Archive.open(kept, read_only=True) as read:
                assert read.questions("development") == ["q1"]
            with pytest.raises(ArchiveError, match="cannot be opened"):
                Archive.open(kept)
        finally:
            if as_root:
                os.setresuid(0, 0, 0)
            Path(folder).chmod(0o755)


def test_bad_files_are_named_with_the_way_out(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="selfdev resume"):
        Archive.create(archive.path, RUN)
    with pytest.raises(ArchiveError, match="holds no run"):
        Archive.open(tmp_path / "nothing" / "archive.db")
    corrupt = tmp_path / "corrupt.db"
    corrupt.write_bytes(b"SQLite format 3\x00" + b"\x07" * 5000)
    with pytest.raises(ArchiveError, match="corrupt"):
        Archive.open(corrupt)
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(ArchiveError, match="cut off"):
        Archive.open(empty)
    archive.close()
    with sqlite3.connect(archive.path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ArchiveError, match="install a newer selfdev"):
        Archive.open(archive.path)


def test_thoughts_that_are_cut_off_are_told_from_what_a_server_refused() -> None:
    nothing = Candidate("learning/1/001", "learning", 0, 0, 0, "", finished=False)
    assert not nothing.cut_off  # refused: no text, and no time
    assert replace(nothing, seconds=1.5).cut_off  # all of it was thought
    assert replace(nothing, text="def").cut_off
    assert not replace(nothing, text="def", finished=True).cut_off
