"""A run on a user's own seed, experts and task, from what `docs/tasks.md` says alone."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

from byte_model import save_byte_model
from selfdev.cli import main
from selfdev.evaluation.tasks import Split, load_task, task_names
from selfdev.evaluation.tasks.declaration import Declaration
from selfdev.results import open_run
from selfdev.zoo import zoo_path

PAGE = (Path(__file__).parents[1] / "docs/tasks.md").read_text(encoding="utf-8")
OWN = PAGE.partition("## A task of your own")[2].partition("\n| field")[0]


def blocks(text: str, language: str) -> list[str]:
    return [
        block
        for its, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if its == language
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: models of their own, and their questions in the form that the page shows."""
    for name in ("seed", "add", "max"):
        shutil.copytree(zoo_path("nano") / name, tmp_path / "models" / name)
    save_byte_model(tmp_path / "models/factory")
    task, run = blocks(OWN, "yaml")
    (tmp_path / "sums.yaml").write_text(task)
    (tmp_path / "mine.yaml").write_text(run)
    stream = random.Random(0)
    pairs = sorted({(stream.randrange(100), stream.randrange(100)) for _ in range(260)})
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    assert [list(json.loads(line)) for line in blocks(OWN, "json")[0].splitlines()] == 2 * [list(rows[0])]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_carry_a_run_to_its_verdict(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [commands] = blocks(OWN, "")
    for command in commands.splitlines():
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    finished = open_run(project / "runs/mine")
    assert finished.archive.run.status == "done"
    assert len(finished.candidates("learning")) == 6
    table = {row["name"]: row for row in finished.verdict["table"]}
    assert table["seed"]["test"]["questions"] == 90
    # The archive's outcomes are those of the task, question by question.
    [seed] = finished.archive.evaluations("seed", split="test")
    assert sum(seed.outcomes) / 90 == seed.score == table["seed"]["test"]["score"]
    assert len(finished.archive.openings()) == 1
    # What a run came to is read without its task: elsewhere, and when its questions are gone.
    (project / "sums.jsonl").unlink()
    best = finished.candidates("learning")[0].name
    for command in (["show", "runs/mine"], ["show", "runs/mine", best]):
        assert main(command) == 0, capsys.readouterr().err


def test_evaluate_shows_every_question(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "models/add", "--task", "sums.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["split"] == "development"
    assert shown["note"] == ""
    assert shown["questions"] == len(shown["answers"]) == load_task("sums.yaml").size(Split.DEVELOPMENT)
    right = [answer["extracted"] == answer["gold"] for answer in shown["answers"]]
    assert [answer["outcome"] for answer in shown["answers"]] == right
    assert shown["score"] == pytest.approx(sum(right) / len(right))
    assert shown["low"] < shown["score"] < shown["high"] or shown["score"] == 1
    assert shown["answers"][0]["where"].startswith("sums.jsonl:")


def test_evaluate_in_nats(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("sums.yaml").open("a") as file:
        file.write("scoring: loglikelihood\n")
    scores = {}
    for model in ("seed", "add"):
        assert main(["evaluate", f"models/{model}", "--task", "sums.yaml", "--json"]) == 0
        scores[model] = json.loads(capsys.readouterr().out)["score"]
    assert scores["seed"] < scores["add"] < 0
    assert main(["evaluate", "models/add", "--task", "sums.yaml", "--limit", "5"]) == 0
    assert "nats a token" in capsys.readouterr().out


def test_the_test_split_opens_only_by_name_and_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "models/add", "--task", "sums.yaml", "--limit", "5", "--split", "test"]) == 0
    assert "the test split of 'sums' was opened outside any run" in capsys.readouterr().out
    assert main(["evaluate", "models/add", "--task", "sums.yaml", "--split", "training"]) == 2
    assert "there are development and test" in capsys.readouterr().err


def test_bad_input_ends_before_the_model_is_looked_for(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sums.jsonl").write_text('{"question": "1+1="}\n')
    assert main(["evaluate", "no/model", "--task", "sums.yaml"]) == 2
    assert "sums.yaml:4: the template `target` names the column 'answer'" in capsys.readouterr().err
    assert main(["run", "mine.yaml", "--out", "runs/bad"]) == 2
    assert "sums.yaml:4" in capsys.readouterr().err
    assert not Path("runs/bad").exists()


def test_a_prompt_longer_than_the_context_is_refused_with_its_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{'1' * n}=", "answer": "1"} for n in range(1, 90)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "models/add", "--task", "sums.yaml"]) == 2
    assert re.search(r"sums.jsonl:\d+: prompt and answer need", capsys.readouterr().err)


def test_the_page_describes_every_field_and_task() -> None:
    fields = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    described = fields | {"development_data", "test_data", "few_shot_data"}
    assert set(Declaration.model_fields) - {"hub"} <= described
    assert set(task_names()) <= described
