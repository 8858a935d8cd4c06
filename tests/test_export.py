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
from selfdev.merging.discovered import load_candidate
from selfdev.merging.targets import layer_of
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.zoo import zoo_models

NAME = "learning/1/001"
SOURCE = """import torch


def merge_bold(deltas):
    return deltas.sum(dim=0).abs().sqrt() * deltas.mean(dim=0).sign() * deltas[0].abs()


def merge_models(model_dict, device):
    return merge_bold(torch.stack(list(model_dict.values())))
"""
CONTEXT = """import math


def merge_models(model_dict, device, context):
    share = (context.layer + 2) / (context.layers + 1)
    context.seed.mul_(math.sqrt(len(context.name)))  # no other may see it
    return share * sum(model_dict.values()) + 0.01 * context.seed
"""
WAYWARD = '''import torch as register

MERGED = LAYER = FACTOR = PROGRAM = merge_method = discovered = context_of = program_for = None
PATTERN = r"""\\d"""


def merge_models(model_dict, device, context):
    """Draws, and has the exported module's names for its own."""
    weights = register.rand(len(model_dict))
    assert PATTERN == chr(92) + "d" and __name__ != "__main__"
    return sum(w * v for w, v in zip(weights, model_dict.values())) + 0.001 * (context.layer + 2) / context.layers


if __name__ == "__main__":
    raise SystemExit("ran outside of the merge")
'''
ZOO = zoo_models("nano")


def a_run(folder: Path, source: str = SOURCE, factor: float = 2.0, targets: str = "mlp") -> Path:
    """An archive with one program, best at `factor` times its scale."""
    folder.mkdir()
    changes = ["iterations=1", "programs=1", "prompt.prompts=1", f"merge.targets={targets}"]
    config = load_config("quickstart", changes)
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


# In a process of its own: the file and what it is called with come in, its results go out.
ALONE = """
import runpy, sys, types
for other in ("selfdev", "mergekit", "transformers", "safetensors", "numpy"):
    sys.modules[other] = None  # importing it fails
import torch
file, given, out = sys.argv[1:]
merge_models = runpy.run_path(file)["merge_models"]
merged = {}
for name, (task_vectors, *context) in torch.load(given, weights_only=True).items():
    merged[name] = merge_models(task_vectors, "cpu", *(types.SimpleNamespace(**each) for each in context))
torch.save(merged, out)
"""


def run_alone(file: Path, given: dict[str, list[object]], folder: Path) -> dict[str, torch.Tensor]:
    """What an exported file makes of tensors where nothing but torch can be imported."""
    torch.save(given, folder / "given.pt")
    words = [file, folder / "given.pt", folder / "merged.pt"]
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged: dict[str, torch.Tensor] = torch.load(folder / "merged.pt", weights_only=True)
    return merged


def test_a_python_file_needs_torch_alone(tmp_path: Path) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "bold.py"
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(out)]) == 0
    text = out.read_text()
    assert text.startswith(f'"""Candidate `{NAME}` of the run `run`')
    assert "`merge_models(model_dict, device)` takes each expert's task vector" in text
    assert "Scores hold for these models" in text
    vectors = read_task_vectors(ZOO["seed"], ZOO["experts"], "mlp")
    merged = run_alone(out, {name: [each] for name, each in vectors.vectors.items()}, tmp_path)
    for name, tensor in expected().items():
        # To the last bit only where both processes have as many threads, which add up in another order.
        torch.testing.assert_close(vectors.seed[name] + merged[name], tensor, rtol=1e-5, atol=1e-6)
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(out)]) == 2


def test_a_python_file_takes_the_context_that_its_program_asks_for(tmp_path: Path) -> None:
    run, out = a_run(tmp_path / "run", CONTEXT, factor=0.5, targets="all"), tmp_path / "told.py"
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(out)]) == 0
    assert "`merge_models(model_dict, device, context)` takes" in out.read_text()
    assert main(["export", str(run), NAME, "--to", "model", "--out", str(tmp_path / "model")]) == 0
    order = load_config("quickstart").merge.experts
    vectors = read_task_vectors(ZOO["seed"], {name: ZOO["experts"][name] for name in order}, "all")
    given = {
        name: [each, {"seed": vectors.seed[name].clone(), "name": name, "layer": layer_of(name), "layers": 3}]
        for name, each in vectors.vectors.items()
    }
    merged = run_alone(out, given, tmp_path)
    model = load_file(tmp_path / "model/model.safetensors")
    assert set(merged) == set(model)
    for name, tensor in merged.items():
        torch.testing.assert_close(vectors.seed[name] + tensor, model[name], rtol=1e-5, atol=1e-6)


def by_mergekit(module: Path, out: Path, more: str = "") -> dict[str, torch.Tensor]:
    """What mergekit writes when it merges the zoo by an exported module."""
    order = load_config("quickstart").merge.experts
    models = "\n".join(f"  - model: {ZOO['experts'][name]}" for name in order)
    recipe = f"merge_method: selfdev_learning_1_001\nbase_model: {ZOO['seed']}\ndtype: float32\nmodels:\n{models}\n{more}"
    module.with_suffix(".yml").write_text(recipe)
    command = [sys.executable, module, module.with_suffix(".yml"), out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors")


def test_mergekit_itself_merges_by_it(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    run, module = a_run(tmp_path / "run"), tmp_path / "bold.py"
    assert main(["export", str(run), NAME, "--to", "mergekit", "--out", str(module)]) == 0
    merged = by_mergekit(module, tmp_path / "out")
    seed = load_file(ZOO["seed"] / "model.safetensors")
    wanted = expected()
    assert wanted.keys() < merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted.get(name, seed[name].float()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("source", [CONTEXT, pytest.param(WAYWARD, marks=pytest.mark.proof)])
def test_mergekit_runs_a_program_as_the_jail_did(tmp_path: Path, source: str) -> None:
    pytest.importorskip("mergekit")
    run, module = a_run(tmp_path / "run", source, factor=0.5, targets="all"), tmp_path / "told.py"
    assert main(["export", str(run), NAME, "--to", "mergekit", "--out", str(module)]) == 0
    assert main(["export", str(run), NAME, "--to", "model", "--out", str(tmp_path / "model")]) == 0
    wanted = load_file(tmp_path / "model/model.safetensors")
    merged = by_mergekit(module, tmp_path / "out")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name].to(tensor.dtype), tensor, atol=1e-6, rtol=1e-5)

    # The number of layers may be said, where no config tells it.
    other = by_mergekit(module, tmp_path / "other", "parameters: {layers: 6}\n")
    assert not any(torch.equal(other[name], merged[name]) for name in merged if "mlp" in name)


def test_a_model_is_what_the_run_scored(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert main(["export", str(run), NAME, "--to", "model", "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected().items():
        torch.testing.assert_close(merged[name].float(), tensor, atol=1e-6, rtol=1e-5)
    # As it was written it scored nothing; its card tells what was scored at the scale of this model.
    card = (tmp_path / "out" / "README.md").read_text()
    assert "at 2 times its scale" in card
    assert f"| {NAME} | None | 100.0 (1 questions) | | |" in card
    assert "on others they are unknown. They are right answers in %." in card


@pytest.mark.parametrize(
    ("head", "called"),
    [
        ("def merge_models(model_dict, device, context):", "model_dict, device, context"),
        ("def merge_models(model_dict, device, context=None):", "model_dict, device, context"),
        ("def merge_models(model_dict, device, told, /):", "model_dict, device, context"),
        ("def merge_models(model_dict, device, scale=0.5):", "model_dict, device"),
        ("def merge_models(model_dict, device, *, context=None):", "model_dict, device"),
        ("@torch.no_grad()\ndef merge_models(model_dict, device, context=None):", "model_dict, device"),
    ],
)
def test_a_scaled_program_is_called_as_the_jail_calls_it(tmp_path: Path, head: str, called: str) -> None:
    run = a_run(
        tmp_path / "run", f"import torch\n\n{head}\n    return sum(model_dict.values())\n", factor=0.5
    )
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "x.py")]) == 0
    assert f"return 0.5 * merge_models_as_written({called})" in (tmp_path / "x.py").read_text()


def test_an_export_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", SOURCE + "# " + 100_000 * "x" + "\n")
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "none/x.py")]) == 2
    assert "none/x.py' cannot be written: No such file or directory" in capsys.readouterr().err
    code = (
        "import resource, sys\nfrom selfdev.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))\nsys.exit(main(sys.argv[1:]))"
    )
    words = ["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "x.py")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "x.py' cannot be written: File too large; make room" in done.stderr
    assert not (tmp_path / "x.py").exists()


def test_a_hostile_docstring_stays_text(tmp_path: Path) -> None:
    run = a_run(tmp_path / 'run"""\\')
    assert main(["export", str(run), NAME, "--to", "py", "--out", str(tmp_path / "x.py")]) == 0
    compile((tmp_path / "x.py").read_text(), "x.py", "exec")


def test_a_finalist_has_the_scale_of_the_verdict_though_another_scored_higher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path / "run", factor=2.0)
    assert load_candidate(folder, "learning/1/001").factor == 2.0
    row = {"name": "learning/1/001", "kind": "discovered", "parameters": {"factor": 0.7}, "test": None}
    table = {"table": [{**row, "dev": {"score": None, "questions": 0}}]}  # its floors let no more
    monkeypatch.setattr(Archive, "verdict", lambda self: table)
    assert load_candidate(folder, "learning/1/001").factor == 0.7
