"""Scores that were measured before: found by what they depend on, and by nothing else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdev.cli import main
from selfdev.evaluation.measure import measure
from selfdev.evaluation.score_cache import ScoreCache, score_key
from selfdev.evaluation.scoring import Reply, Scored
from selfdev.evaluation.tasks import Split, load_task
from selfdev.evaluation.tasks.grading import Extraction, Grading, Reading, Way
from selfdev.models.sources import Located
from selfdev.zoo import zoo_models

TASK = 'name: sums\ngroup: all\ndata: sums.jsonl\nprompt: "{{question}}"\ndelimiter: ""\nstop: ["\\n"]\nmax_new_tokens: 3\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_models("nano")["seed"], tmp_path / "model"))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 18) for b in range(20, 25)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK)
    return tmp_path / "sums.yaml"


def keys(model: Path, task: Path) -> str:
    loaded = load_task(str(task))
    # The name of a task is in the order of its questions, which the key knows.
    questions = sorted(
        loaded.development(loaded.size(Split.DEVELOPMENT), 0), key=lambda question: question.text
    )
    return score_key(Located(model), questions, loaded.grading)


def test_what_was_measured_comes_back_to_the_bit(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores")
    assert cache.get("k") is None
    reading = {"strict": Reading("7", True), "loose": Reading("[invalid]", False)}
    written = Scored(torch.tensor([True, False]), (Reply("it is 7", reading), Reply("é\n", {})))
    cache.put("k", written, (1.5, 2.5))
    found = cache.get("k")
    assert found is not None
    assert found.scored.outcomes.dtype == torch.bool
    assert torch.equal(found.scored.outcomes, written.outcomes)
    assert found.scored.replies == written.replies
    assert found.seconds == (1.5, 2.5)
    likelihoods = Scored(torch.tensor([-0.1, -1 / 3, -float("1e-8")]))
    cache.put("l", likelihoods, (0.0, 0.0))
    found = cache.get("l")
    assert found is not None
    assert torch.equal(found.scored.outcomes, likelihoods.outcomes)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcomes": [1]}', "\x00"])
def test_a_damaged_entry_is_measured_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(text)
    assert ScoreCache(tmp_path).get("k") is None


def test_the_key_knows_no_name(model: Path, task: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(model, elsewhere / "another-model")
    shutil.copy(task.parent / "sums.jsonl", elsewhere)
    (elsewhere / "other.yaml").write_text(TASK.replace("name: sums", "name: other"))
    renamed = keys(elsewhere / "another-model", elsewhere / "other.yaml")
    assert renamed == keys(model, task)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"{{question}}"', '"{{question}} "'),
        ('delimiter: ""', 'delimiter: " "'),
        ('stop: ["\\n"]', 'stop: ["\\n", "="]'),
        ("max_new_tokens: 3", "max_new_tokens: 4"),
        ("data:", "few_shot: 1\ndata:"),
        ("data:", "checker: numeric\ndata:"),
        ("data:", "extract: '\\d+'\ndata:"),
        ("data:", "scoring: loglikelihood\ndata:"),
    ],
)
def test_an_edited_template_or_setting_misses(old: str, new: str, model: Path, task: Path) -> None:
    before = keys(model, task)
    assert old in TASK
    task.write_text(TASK.replace(old, new))
    assert keys(model, task) != before


def test_other_data_weights_or_tokenizer_miss(model: Path, task: Path) -> None:
    before = [keys(model, task)]
    rows = (task.parent / "sums.jsonl").read_text()
    (task.parent / "sums.jsonl").write_text(
        rows.replace("+2", "+4")
    )  # the answers are wrong now, which nobody checks
    before.append(keys(model, task))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    before.append(keys(model, task))
    shutil.copy(zoo_models("nano")["experts"]["add"] / "model.safetensors", model)
    before.append(keys(model, task))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        before.append(keys(model, task))
    finally:
        torch.set_num_threads(threads)
    assert len(set(before)) == len(before)


def test_the_pick_of_an_extraction_counts(model: Path) -> None:
    questions = load_task("nano").development(6, 0)
    first = Grading(Way.GENERATE, extractions={"a": Extraction(re.compile("x"), 0)})
    last = replace(first, extractions={"a": Extraction(re.compile("x"), -1)})
    assert score_key(Located(model), questions, first) != score_key(Located(model), questions, last)
    assert score_key(Located(model), questions, first) != score_key(Located(model), questions[::-1], first)


def test_evaluate_asks_a_model_once(
    model: Path,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    words = ["evaluate", str(model), "--task", str(task), "--limit", "8", "--json"]

    def evaluated(*more: str) -> dict[str, object]:
        assert main([*words, *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    first = evaluated()
    assert "--fresh" not in str(first["note"])
    second = evaluated()
    assert "and kept; --fresh measures anew" in str(second["note"])
    assert second | {"note": ""} == first | {"note": ""}
    third = evaluated("--fresh")
    assert third["note"] == ""
    assert third["answers"] == first["answers"]
    task.write_text(TASK.replace("max_new_tokens: 3", "max_new_tokens: 2"))
    assert evaluated()["note"] == ""


def test_a_measurement_is_told_where_it_cannot_be_kept(
    model: Path,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["evaluate", str(model), "--task", str(task), "--limit", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["answers"]) == 8
    assert "not kept for the next time: " in told["note"]


def test_a_type_of_weights_has_scores_of_its_own(
    model: Path,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    words = ["evaluate", str(model), "--task", str(task), "--limit", "8", "--json"]
    notes = []
    for more in ([], ["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--device", "cpu"]):
        assert main([*words, *more]) == 0
        notes.append(json.loads(capsys.readouterr().out)["note"])
    assert notes[:2] == ["", ""]
    assert "--fresh measures anew" in notes[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(
    model: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(model), "--task", str(task), "--device", "cuda"]) == 2
    assert "--device: cuda, and torch finds none on this machine" in capsys.readouterr().err


def test_a_test_split_from_the_cache_says_that_it_was_opened(model: Path, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores")
    first = measure(str(model), "nano", "test", 12, cache)
    second = measure(str(model), "nano", "test", 12, cache)
    assert "the test split of 'nano' was opened outside any run" in second.note
    assert "; measured on" in second.note
    assert second.answers == first.answers
    assert (second.score, second.low, second.high) == (first.score, first.low, first.high)
