"""Whole runs with a scripted factory: weights and floors, likelihood, generation; each with a race, to the verdict."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.evaluation.standing import ranked_new
from selfdev.evaluation.tasks import Split, load_task
from selfdev.results import Run
from selfdev.runs import run

NEW = PROGRAMS[:4]


def finished(folder: Path, **changes: Any) -> Run:
    changes = {"race": {"first": 24, "growth": 2.0, "alpha": 0.3}} | changes
    settings = scripted_config(
        iterations=1,
        programs=len(NEW),
        preferences={"elites": 1, "chosen_floor": 1},
        rivals=["task_arithmetic", "dare_ties"],
        controls=[],
        scaling={},
        jail={"wall_seconds": 10.0},
        **changes,
    )
    return run(settings, folder, factory=ScriptedFactory(NEW))


def shown(found: Run, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `selfdev show --json` prints; the page for people is printed too."""
    assert main(["show", str(found.folder)]) == 0
    assert found.config.name in capsys.readouterr().out
    assert main(["show", str(found.folder), "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert summary["run"]["status"] == "done"
    assert [row["kind"] for row in summary["table"]][:3] == ["seed", "rival", "rival"]
    assert summary["table"][3]["name"] == summary["best"]["candidate"]
    return summary


def by_hand(tasks: dict[str, dict[str, float]], split: str, weights: dict[str, float]) -> float:
    shares = {group: weights.get(group, 1.0) for group in tasks}
    return sum(shares[g] * tasks[g][split] for g in tasks) / sum(shares.values())


def test_weights_and_floors_with_a_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"add": 3.0, "max": 0.5}
    # No merge can gain 100 points, so a floor of 0 on a task that merging harms leaves those that do not harm it.
    task = {"name": "nano", "development": 120, "test": 120, "weights": weights, "floors": {"rev": 5.0}}
    found = finished(tmp_path / "run", task=task)
    summary = shown(found, capsys)
    seed, *rows = summary["table"]
    for row in (seed, *rows):
        for split in ("dev", "test"):
            assert row[split]["score"] == pytest.approx(by_hand(row["tasks"], split, weights))
    for row in rows:
        if row["kind"] == "discovered":
            assert seed["tasks"]["rev"]["dev"] - row["tasks"]["rev"]["dev"] <= 0.05 + 1e-9
        lost = seed["tasks"]["rev"]["test"] - row["tasks"]["rev"]["test"]
        assert row["below_floor"] == ({"rev": pytest.approx(lost)} if lost > 0.05 + 1e-9 else {})
        if (against := row["against_best_rival"]) is not None:
            assert against["test"] == "stratified paired permutation"
            assert against["low"] <= against["difference"] <= against["high"]
    # Whoever answered everything and stands in no table was kept from it by the floor.
    named = {row["name"] for row in rows}
    for each in found.archive.evaluations("candidate"):
        groups = found.archive.groups_of(each)
        lost = loss(each.outcomes, seed_on(found, each), groups, "rev")
        if each.questions == 120:
            assert (each.subject in named) == (lost <= 0.05 + 1e-9)


def test_new_programs_that_all_lose_too_much_are_not_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floors = dict.fromkeys(load_task("nano").groups, 0.0)  # every merge forgets something
    task = {"name": "nano", "development": 120, "test": 60, "floors": floors}
    config = scripted_config(task=task, iterations=1, programs=3, rivals=["ties"], scaling={})
    ended = run(config, tmp_path / "run", factory=ScriptedFactory())
    assert [c.status for c in ended.candidates("learning")] == ["new"] * 3
    assert ended.verdict["headline"] == "no new program keeps the run's floors: nothing to compare"
    assert main(["show", str(ended.folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "There is no winner: no new program keeps the floors" in printed
    assert "The control 'frozen' has no new program that keeps the floors." in printed


def seed_on(found: Run, evaluation: Any) -> list[float]:
    [seed] = found.archive.evaluations("seed", split="development")
    asked = range(seed.questions) if evaluation.asked is None else evaluation.asked
    return [seed.outcomes[position] for position in asked]


def loss(mine: Any, its: Any, groups: Any, group: str) -> float:
    pairs = [(a, b) for a, b, g in zip(mine, its, groups, strict=True) if g == group]
    return float(np.mean([b for _, b in pairs]) - np.mean([a for a, _ in pairs]))


def own_task(folder: Path, **fields: Any) -> str:
    """Sums and differences in the zoo's own characters, in two groups."""
    stream = random.Random(0)
    drawn = sorted(
        {(kind, stream.randrange(60, 100), stream.randrange(60)) for kind in "+-" for _ in range(150)}
    )
    rows = [
        {"kind": kind, "sum": f"{a}{kind}{b}", "result": a + b if kind == "+" else a - b}
        for kind, a, b in drawn
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = {
        "name": "sums",
        "data": "sums.jsonl",
        "prompt": "{{sum}}=",
        "target": "{{result}}",
        "group": "{{kind}}",
        "delimiter": "",
        "max_new_tokens": 6,
    }
    (folder / "sums.yaml").write_text(json.dumps(declared | fields))  # JSON is YAML
    return str(folder / "sums.yaml")


def test_a_task_in_nats_with_a_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = own_task(tmp_path, scoring="loglikelihood")
    found = finished(tmp_path / "run", task={"name": task, "development": 48, "test": 60})
    summary = shown(found, capsys)
    for row in summary["table"]:
        for split in ("dev", "test"):
            assert row[split]["score"] < 0
            assert row[split]["score"] == pytest.approx(by_hand(row["tasks"], split, {}))
        assert row["test"]["low"] < row["test"]["score"] < row["test"]["high"]
    discovered = [row for row in summary["table"] if row["kind"] == "discovered"]
    assert discovered[0]["dev"]["score"] == max(row["dev"]["score"] for row in discovered)
    assert discovered[0]["against_best_rival"]["test"] == "stratified paired permutation"
    [first] = summary["iterations"]
    assert first["best_dev"] == discovered[0]["dev"]["score"]
    asked = [e.questions for e in found.archive.evaluations("candidate")]
    assert set(asked) <= {24, 48}
    assert max(asked) == 48


def test_a_task_that_is_generated_with_a_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = own_task(tmp_path, checker="numeric", extract={"pattern": "[0-9]+", "pick": "last"})
    found = finished(tmp_path / "run", task={"name": task, "development": 96, "test": 90})
    summary = shown(found, capsys)
    for row in summary["table"]:
        assert 0 <= row["test"]["low"] <= row["test"]["score"] <= row["test"]["high"] <= 1
        assert row["test"]["questions"] == 90
    asked = [e.questions for e in found.archive.evaluations("candidate")]
    assert set(asked) <= {24, 48, 96}
    assert max(asked) == 96
    best = ranked_new(found.archive, "learning")[0][1]
    # Of right and wrong answers that count alike.
    assert summary["table"][3]["against_best_rival"]["test"] == "exact McNemar"
    assert best.score == sum(best.outcomes) / 96


def test_a_prompt_that_does_not_fit_ends_the_run_before_anything_is_written(tmp_path: Path) -> None:
    task = own_task(tmp_path, max_new_tokens=5000, few_shot=2, separator=",")
    with pytest.raises(UserError, match=r"sums.jsonl:\d+: prompt and answer need \d+ \+ 5000 tokens"):
        finished(tmp_path / "run", task={"name": task, "development": 48, "test": 60})
    assert not (tmp_path / "run/archive.db").exists()


def test_a_test_question_that_does_not_fit_ends_the_run_before_anything_is_written(tmp_path: Path) -> None:
    name, data = own_task(tmp_path), tmp_path / "sums.jsonl"
    short = data.read_text()
    for last in range(10):  # until the long one falls into the test split
        long = "9" * 80 + str(last)
        data.write_text(short + json.dumps({"kind": "+", "sum": long, "result": 1}) + "\n")
        task = load_task(name)
        development = task.development(task.size(Split.DEVELOPMENT), 0)
        if not any(long in question.prompt for question in development):
            break
    counts = {"development": 48, "test": task.size(Split.TEST)}
    with pytest.raises(UserError, match=r"sums.jsonl:\d+: prompt and answer need"):
        finished(tmp_path / "run", task={"name": name, **counts})
    assert not (tmp_path / "run/archive.db").exists()
