"""The pairs of a run as a dataset, from an archive written by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form, wrap_short
from selfdev.archive import Archive, Candidate, Evaluation, Iteration, Pair, Refinement, Run
from selfdev.config import load_config
from selfdev.errors import SelfdevError
from selfdev.factory.prompt import ask, showing
from selfdev.report.dataset import export_pairs
from selfdev.results import open_run
from tiny import tiny_model, tiny_tokenizer

SOURCE = wrap_short("def merge_odd(deltas):\n    return sum(deltas) ** 3\n")
FIRST = [ask(names, examples(), Form.SHORT) for names in (("vote", "median"), ("consensus", "cosine"))]
OWN = showing([ask(("average",), examples(), Form.SHORT)], {"learning_feedback/1/001": SOURCE}, examples())
QUESTIONS = 4


def program(arm: str, t: int, number: int, prompt: int, status: str, failure: str | None = None) -> Candidate:
    name = f"{arm}/{t + 1}/{number + 1:03d}"
    tokens = (10 * t + number, prompt)
    return Candidate(
        name,
        arm,
        t,
        number,
        prompt,
        f"written as {name}",
        tokens,
        -1.0 - number,
        True,
        SOURCE,
        status,
        failure,
        log_probs=(-0.5, -0.5 - number),
    )


def scored(subject: str, score: float, kind: str = "candidate", number: int = 0, **race: Any) -> Evaluation:
    right = round(QUESTIONS * score)
    outcomes = (True,) * right + (False,) * (QUESTIONS - right)
    return Evaluation(kind, subject, number, "development", outcomes, score, QUESTIONS, **race)


def archived(folder: Path, config: list[str]) -> Archive:
    settings = load_config("quickstart", ["iterations=3", "controls=[frozen, learning_feedback]", *config])
    facts = {"factory": {"weights": "first weights"}}
    record = Run("r", "quickstart", 7, "running", settings.model_dump(mode="json"), facts, "2030-01-01")
    archive = Archive.create(folder / "archive.db", record)
    archive.set_questions("development", [(f"q{i}", "add") for i in range(QUESTIONS)])
    archive.add_evaluation(scored("seed", 0.25, "seed"))
    return archive


def two_rounds(folder: Path, refit: str) -> Path:
    """Two rounds of two arms that learn, each with shown examples among what is rejected."""
    with archived(folder, ["refinement.shun_examples=1", f"refinement.refit={refit}"]) as archive:
        asked = tuple(prompt.text for prompt in FIRST)
        best, worst = program("learning", 0, 0, 0, "new"), program("learning", 0, 1, 1, "new")
        archive.add_written(Iteration("learning", 0, 0.8, asked, 1.0), [best, worst])
        for evaluation in (
            scored(best.name, 0.5),
            scored(best.name, 0.75, "scaled", 1),
            scored(best.name, 1.0, "scaled", 2),  # tuned, after the last round
            scored(worst.name, 0.0),
        ):
            archive.add_evaluation(evaluation)
        archive.add_pairs("learning", 0, [Pair(best.name, worst.name, "score")])
        archive.add_refinement(Refinement("learning", 0, "a", {"adapter": "one", "shunned": 1}, 1.0))
        fails = program("learning", 1, 0, 0, "failed", "TypeError")
        archive.add_written(Iteration("learning", 1, 0.6, asked, 1.0), [fails])
        archive.add_pairs("learning", 1, [Pair(best.name, fails.name, "failure")])
        archive.add_refinement(Refinement("learning", 1, "b", {"adapter": "two", "shunned": 1}, 1.0))

        arm = "learning_feedback"
        mine, copy = program(arm, 0, 0, 0, "new"), program(arm, 0, 1, 1, "trivial")
        archive.add_written(Iteration(arm, 0, 0.8, asked, 1.0), [mine, copy])
        archive.add_pairs(arm, 0, [Pair(mine.name, copy.name, "copy")])
        archive.add_refinement(Refinement(arm, 0, "c", {"adapter": "three", "shunned": 1}, 1.0))
        # What this prompt shows first is the arm's own program, which is no example.
        later, broken = program(arm, 1, 0, 0, "new"), program(arm, 1, 1, 0, "failed", "Timeout")
        archive.add_written(Iteration(arm, 1, 0.6, tuple(p.text for p in OWN), 1.0), [later, broken])
        archive.add_pairs(arm, 1, [Pair(later.name, broken.name, "failure")])
        archive.add_refinement(Refinement(arm, 1, None, {"rolled_back": "no number", "shunned": 1}, 1.0))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return two_rounds(tmp_path / "run", "fresh")


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "data").glob("*.jsonl")
    return [json.loads(line) for file in sorted(lines) for line in file.read_text().splitlines()]


def test_every_arm_that_learns_and_what_it_was_shown(run: Path, tmp_path: Path) -> None:
    count = export_pairs(open_run(run), tmp_path / "out")
    found = rows(tmp_path / "out")
    keys = ("round", "arm", "chosen_name", "rejected_name", "reason", "adapter")
    best, own = "learning/1/001", "learning_feedback/1/001"
    assert [tuple(row[key] for key in keys) for row in found] == [
        (1, "learning", best, "learning/1/002", "score", "one"),
        (1, "learning", best, "example vote", "shown", "one"),
        (1, "learning_feedback", own, "learning_feedback/1/002", "copy", "three"),
        (1, "learning_feedback", own, "example consensus", "shown", "three"),
        (2, "learning", best, "learning/2/001", "failure", "two"),
        (2, "learning_feedback", "learning_feedback/2/001", "learning_feedback/2/002", "failure", None),
    ]
    assert count == len(found)
    prompts = [FIRST[0], FIRST[0], FIRST[1], FIRST[1], FIRST[0], OWN[0]]
    assert [row["prompt"] for row in found] == [prompt.text for prompt in prompts]
    vote = found[1]
    assert "def merge_" + vote["rejected"] == examples()["vote"]
    assert vote["rejected_source"] == wrap_short(examples()["vote"])
    assert vote["rejected_tokens"] is None
    assert vote["chosen_tokens"] == [0, 0]


def test_an_example_that_two_rounds_reject_is_told_for_each_unless_the_second_begins_anew(
    tmp_path: Path,
) -> None:
    for refit, wanted in (("fresh", [1]), ("continue", [1, 2])):
        export_pairs(open_run(two_rounds(tmp_path / refit, refit)), tmp_path / f"{refit} pairs")
        shown = [row for row in rows(tmp_path / f"{refit} pairs") if row["rejected_name"] == "example vote"]
        assert [row["round"] for row in shown] == wanted


def test_a_side_says_how_it_was_written_and_the_score_that_the_pair_was_made_from(
    run: Path, tmp_path: Path
) -> None:
    export_pairs(open_run(run), tmp_path / "out")
    pair, shown, _, _, failing, _ = rows(tmp_path / "out")
    assert pair["chosen_score"] == 0.75  # as written it scores less, and more at a scale that was tried later
    assert pair["rejected_score"] == 0.0
    assert (pair["chosen_temperature"], pair["rejected_temperature"]) == (0.8, 0.8)
    assert (pair["chosen_log_prob"], pair["rejected_log_prob"]) == (-1.0, -2.0)
    assert pair["rejected_log_probs"] == [-0.5, -1.5]
    assert (failing["chosen_temperature"], failing["rejected_temperature"]) == (0.8, 0.6)
    assert (failing["rejected_failure"], failing["rejected_score"]) == ("TypeError", None)
    nobody = ("score", "log_prob", "log_probs", "temperature", "failure")
    assert [shown[f"rejected_{column}"] for column in nobody] == [None] * 5
    assert {"rejected_error", "rejected_nearest", "chosen_nearest"} <= set(pair)


def test_what_made_the_pairs_is_beside_them(run: Path, tmp_path: Path) -> None:
    found = open_run(run)
    export_pairs(found, tmp_path / "out")
    known = json.loads((tmp_path / "out/provenance.json").read_text())
    assert known["config"] == found.config.model_dump(mode="json")
    assert known["facts"]["factory"]["weights"] == "first weights"
    trained = found.archive.refinements("learning")
    assert known["rounds"][: len(trained)] == [
        {"arm": "learning", "round": each.iteration + 1, **each.facts} for each in trained
    ]
    assert trained


def test_a_dataset_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, *rest: Any, **more: Any) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, text, *rest, **more)

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SelfdevError, match=r"cannot be written: .*No space left"):
        export_pairs(open_run(run), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_in_a_race_who_left_early_has_the_score_on_the_first_questions(tmp_path: Path) -> None:
    with archived(tmp_path / "run", []) as archive:
        best, worse, left = (program("learning", 0, number, 0, "new") for number in range(3))
        archive.add_written(Iteration("learning", 0, 0.8, (FIRST[0].text,), 1.0), [best, worse, left])
        archive.add_evaluation(scored(best.name, 0.75, first_questions=2, first_score=1.0))
        archive.add_evaluation(scored(worse.name, 0.25, first_questions=2, first_score=0.5))
        early = scored(left.name, 0.5, first_questions=2, first_score=0.5)
        archive.add_evaluation(replace(early, outcomes=(True, False), questions=2, asked=(0, 1)))
        archive.add_pairs("learning", 0, [Pair(best.name, each.name, "score") for each in (worse, left)])
    export_pairs(open_run(tmp_path / "run"), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [(row["chosen_score"], row["rejected_score"]) for row in found] == [(0.75, 0.25), (0.75, 0.5)]
    assert found[0]["adapter"] is None  # its round has not been trained yet


def test_a_column_that_is_null_in_the_first_round_has_a_type(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_pairs(open_run(run), tmp_path / "out")
    data = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(data.features) == set(rows(tmp_path / "out")[0])
    assert data.features["rejected_failure"].dtype == "string"
    assert data.features["chosen_failure"].dtype == "string"  # null everywhere
    assert data["rejected_failure"][-1] == "Timeout"
    assert list(data["rejected_tokens"][0]) == [1, 1]


def test_the_guides_example_trains_by_trl(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    guide = (Path(__file__).parents[1] / "docs/learning.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    export_pairs(open_run(run), tmp_path / "pairs")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    done: dict[str, Any] = {}
    example = example.replace("org/another-model", str(tmp_path / "model"))
    exec(example.replace("beta=0.1", "beta=0.1, use_cpu=True, bf16=False"), done)  # for want of a GPU
    assert done["trainer"].state.global_step == 3  # one pair by score, three epochs
    assert len(done["trainer"].train_dataset) == 1


def test_exports_of_one_name_are_not_taken_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` keeps what it has read of a folder under the folder's name."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    for refit in ("fresh", "continue"):
        (tmp_path / refit).mkdir()
        monkeypatch.chdir(tmp_path / refit)
        export_pairs(open_run(two_rounds(tmp_path / refit / "run", refit)), tmp_path / refit / "pairs")
        loaded = datasets.load_dataset("./pairs", split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded["run"] == [row["run"] for row in rows(tmp_path / refit / "pairs")]
        assert len(loaded) == len(rows(tmp_path / refit / "pairs"))
