"""Adapters as one: the model with their sum is the model with each of them merged in turn."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from byte_model import save_byte_model
from selfdev.errors import SelfdevError
from selfdev.factory.combined_adapter import combine_adapters, combined_rank
from selfdev.models.folder import load_model


def adapter(base: Path, folder: Path, seed: int, **settings: object) -> Path:
    """An adapter with random factors: both of them, so that it changes the model."""
    model = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("base") / "model")


def weights(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The model's weights with each adapter merged in turn."""
    model = load_model(base)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.state_dict()


def test_the_sum_is_exact_whatever_the_ranks_scales_and_modules(base: Path, tmp_path: Path) -> None:
    adapters = [
        adapter(base, tmp_path / "warm", 0, r=4, lora_alpha=4, target_modules="all-linear"),
        adapter(base, tmp_path / "own", 1, r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
        adapter(base, tmp_path / "last", 2, r=3, lora_alpha=2, use_rslora=True, target_modules="all-linear"),
    ]
    out = tmp_path / "sum"
    out.mkdir()
    combine_adapters(adapters, out)
    assert combined_rank(adapters) == 9
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 9
    before, one_by_one, at_once = weights(base), weights(base, *adapters), weights(base, out)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-6, rtol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], one_by_one[name])}
    assert len(changed) == 2 * 7  # every linear layer of two blocks


def test_one_adapter_alone_stays_what_it_is(base: Path, tmp_path: Path) -> None:
    own = adapter(base, tmp_path / "own", 3, r=4, lora_alpha=4, target_modules="all-linear")
    out = tmp_path / "sum"
    out.mkdir()
    combine_adapters([own], out)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (own, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_more_than_plain_lora_is_refused(base: Path, tmp_path: Path) -> None:
    dora = adapter(base, tmp_path / "dora", 4, r=2, use_dora=True, target_modules=["q_proj"])
    out = tmp_path / "sum"
    out.mkdir()
    with pytest.raises(SelfdevError, match="no plain LoRA"):
        combine_adapters([dora], out)
