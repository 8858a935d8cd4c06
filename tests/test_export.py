"""Exported programs, run by Python alone, by mergekit itself, and as a model: all give what the run scored."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfdev.archive import Archive, Candidate, Evaluation, Iteration
from selfdev.archive import Run as RunRecord
from selfdev.cli import main
from selfdev.config import load_config
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.zoo import zoo_models

NAME = "learning/1/001"
SOURCE = """import torch


def merge_bold(deltas):
    return deltas.sum(dim=0).abs().sqrt() * deltas.mean(dim=0).sign() * deltas[0].abs()


def merge_models(model_dict, device):
    return merge_bold(torch.stack(list(model_dict.values())))
"""
CONTEXT = "def merge_models(model_dict, device, context):\n    return context.layer * context.seed\n"
ZOO = zoo_models("nano")


def a_run(folder: Path, source: str = SOURCE, factor: float = 2.0) -> Path:
    """An archive with one program, best at `factor` times its scale."""
    folder.mkdir()
    config = load_config("quickstart", ["iterations=1", "programs=1", "prompt.prompts=1"])
    record = RunRecord(
        "r", "quickstart", 1, "running", config.model_dump(mode="json"), {}, "2030-01-01T00:00:00"
    )
    written = Candidate(NAME, "learning", 0, 0, 0, "text", source=source)
    with Archive.create(folder / "archive.db", record) as archive:
        archive.set_questions("development", [("q", "add")])
        archive.add_written(Iteration("learning", 0, 0.9, ("prompt",), 1.0), [written])
        archive.add_evaluation(Evaluation("candidate", NAME, 0, "development", (False,), 0.0, 1))
        scaled = Evaluation("scaled", NAME, 1, "development", (True,), 1.0, 1, {"factor": factor})
        archive.add_evaluation(scaled)
    return folder


def expected() -> dict[str, torch.Tensor]:
    """Seed plus twice the program's merged task vector, for every merged tensor."""
    vectors = read_task_vectors(ZOO["seed"], ZOO["experts"], "mlp")
    scope: dict[str, object] = {}
    exec(SOURCE, scope)
    merge = scope["merge_models"]
    return {name: vectors.seed[name] + 2.0 * merge(vectors.vectors[name], "cpu") for name in vectors.seed}  # type: ignore[operator]


def test_a_python_file_needs_torch_alone(tmp_path: Path) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "bold.py"
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(out)]) == 0
    text = out.read_text()
    assert text.startswith(f'"""Candidate `{NAME}` of the run `run`')
    assert "Scores hold for these models" in text
    scope: dict[str, object] = {}
    exec(compile(text, str(out), "exec"), scope)
    vectors = read_task_vectors(ZOO["seed"], ZOO["experts"], "mlp")
    for name, tensor in expected().items():
        merged = scope["merge_models"](vectors.vectors[name], "cpu")  # type: ignore[operator]
        assert torch.equal(vectors.seed[name] + merged, tensor)
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(out)]) == 2


def test_mergekit_itself_merges_by_it(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    run, module = a_run(tmp_path / "run"), tmp_path / "bold.py"
    assert main(["export", str(run), NAME, "--to", "mergekit", "--out", str(module)]) == 0
    models = "\n".join(f"  - model: {folder}" for folder in ZOO["experts"].values())
    recipe = f"merge_method: selfdev_learning_1_001\nbase_model: {ZOO['seed']}\ndtype: float32\nmodels:\n{models}\n"
    (tmp_path / "recipe.yml").write_text(recipe)
    command = [sys.executable, module, tmp_path / "recipe.yml", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    seed = load_file(ZOO["seed"] / "model.safetensors")
    wanted = expected()
    assert wanted.keys() < merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted.get(name, seed[name].float()), atol=1e-6, rtol=1e-5)


def test_a_model_is_what_the_run_scored(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert main(["export", str(run), NAME, "--to", "model", "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected().items():
        torch.testing.assert_close(merged[name].float(), tensor, atol=1e-6, rtol=1e-5)


def test_a_program_that_asks_for_its_context_keeps_it_in_python_and_has_none_in_mergekit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", CONTEXT, factor=0.5)
    assert main(["export", str(run), NAME, "--to", "mergekit", "--out", str(tmp_path / "x.py")]) == 2
    assert "--to py" in capsys.readouterr().err
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "x.py")]) == 0
    assert "def merge_models(model_dict, device, context):" in (tmp_path / "x.py").read_text()


def test_a_hostile_docstring_stays_text(tmp_path: Path) -> None:
    run = a_run(tmp_path / 'run"""\\')
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "x.py")]) == 0
    compile((tmp_path / "x.py").read_text(), "x.py", "exec")
