"""LoRA adapters wherever an expert or a model to evaluate is named."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from checkpoints import nano_seed
from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.evaluation.measure import measure
from selfdev.merging.relatives import find_relatives
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.folder import load_model
from selfdev.models.sources import Located, locate
from selfdev.runs import run
from selfdev.transfers import transfer
from selfdev.zoo import zoo_models
from test_checkpoint import LORA, lora, merged
from test_models import tiny_llama

SEED = "zoo:nano/seed"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "small"
    lora(nano_seed(), folder, r=2, target_modules=["up_proj", "down_proj"])
    return folder


@pytest.mark.parametrize("kind", LORA)
def test_a_model_with_its_adapter_is_the_one_that_peft_makes(tmp_path: Path, kind: str) -> None:
    expected = lora(nano_seed(), tmp_path / "adapter", **LORA[kind])
    model = load_model(nano_seed(), adapter=tmp_path / "adapter")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "other")
    lora(tmp_path / "other", tmp_path / "adapter", r=2, target_modules=["up_proj"])
    with pytest.raises(UserError, match=r"adapter '.*': its adapter changes '.*' as of shape"):
        load_model(nano_seed(), adapter=tmp_path / "adapter")


def test_a_task_vector_on_the_seed_is_the_update_itself(tmp_path: Path, adapter: Path) -> None:
    merged(nano_seed(), tmp_path / "whole", lora=adapter, targets="all", scale=1.0)
    whole = read_task_vectors(nano_seed(), {"x": tmp_path / "whole"}, "mlp")
    exact = read_task_vectors(nano_seed(), {"x": locate(str(adapter), SEED)}, "mlp")
    assert exact.vectors.keys() == whole.vectors.keys()
    for name, vectors in exact.vectors.items():
        torch.testing.assert_close(vectors["x"], whole.vectors[name]["x"], atol=1e-6, rtol=0)
        # Of rank 2 exactly, where the difference of two rounded models is of full rank.
        changed = "up_proj" in name or "down_proj" in name
        assert torch.linalg.matrix_rank(vectors["x"], rtol=1e-5) == (2 if changed else 0)


def test_its_identity_is_that_of_base_adapter_and_config(adapter: Path) -> None:
    files = (
        nano_seed() / "model.safetensors",
        adapter / "adapter_model.safetensors",
        adapter / "adapter_config.json",
    )
    found = find_relatives(SEED, {"x": str(adapter), "add": "zoo:nano/add"})
    assert (
        found.expert_hashes["x"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    )
    with pytest.raises(UserError, match="experts 'x' and 'y' have the same weights"):
        find_relatives(SEED, {"x": str(adapter), "y": f"{adapter}+{SEED}"})


def test_a_run_merges_them_and_a_transfer_too(tmp_path: Path, adapter: Path) -> None:
    task = {"name": "nano", "development": 60, "test": 60}
    merge = {"seed": SEED, "experts": {"x": str(adapter), "add": "zoo:nano/add"}}
    config = scripted_config(iterations=1, programs=3, rivals=["task_arithmetic"], task=task, merge=merge)
    found = run(config, tmp_path / "run", factory=ScriptedFactory(PROGRAMS[:3]))
    assert found.best is not None
    assert found.archive.run.facts["experts"] == find_relatives(SEED, config.merge.experts).expert_hashes
    carried = transfer(found.folder, SEED, {"x": str(adapter) + "+zoo:nano/max", "sub": "zoo:nano/sub"})
    assert carried.verdict is not None


def test_evaluate_takes_one(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged(nano_seed(), tmp_path / "whole", lora=adapter, targets="all", scale=1.0)
    whole, thin = (measure(str(folder), "nano", limit=120) for folder in (tmp_path / "whole", adapter))
    assert [answer.outcome for answer in thin.answers] == [answer.outcome for answer in whole.answers]
    assert thin.score != measure(SEED, "nano", limit=120).score
    assert thin.weights not in (whole.weights, measure(SEED, "nano", limit=1).weights)
    assert (
        main(
            [
                "evaluate",
                f"{adapter}+zoo:nano/add",
                "--task",
                "nano",
                "--limit",
                "6",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["weights"] not in (thin.weights, whole.weights)


def test_the_base_is_named_by_the_adapter_or_the_user_or_is_the_seed(tmp_path: Path, adapter: Path) -> None:
    assert locate(str(adapter)) == Located(nano_seed(), adapter)
    add = zoo_models("nano")["experts"]["add"]
    assert locate(f"{adapter}+zoo:nano/add") == Located(add, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert locate(str(nameless), "zoo:nano/add") == Located(add, nameless)
    with pytest.raises(
        UserError, match=r"nameless' does not say what it was trained on; name it as .*\+BASE"
    ):
        locate(str(nameless))
    (nameless / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "./nowhere"})
    )
    with pytest.raises(
        UserError, match=r"trained on './nowhere', which cannot be had: (?s:.)*Name the base yourself"
    ):
        locate(str(nameless))


def test_its_own_tokenizer_comes_first(tmp_path: Path, adapter: Path) -> None:
    assert locate(str(adapter)).tokenizer == nano_seed()
    (adapter / "tokenizer_config.json").write_text("{}")
    try:
        assert locate(str(adapter)).tokenizer == adapter
    finally:
        (adapter / "tokenizer_config.json").unlink()
