"""GGUF files, dequantised one tensor at a time: what transformers itself reads from them, where it would put it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdev.errors import UserError
from selfdev.models.gguf import dequantise
from test_models import tiny_llama, write_gguf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file, and the folder made of it."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(tiny_llama(), folder / "tiny.gguf")
    dequantise(folder / "tiny.gguf", folder / "out")
    return folder / "tiny.gguf", folder / "out"


def test_every_weight_is_what_transformers_reads(folders: tuple[Path, Path]) -> None:
    gguf, out = folders
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_file_is_the_one_that_save_pretrained_writes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = folders
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_the_tokenizer_comes_along(folders: tuple[Path, Path]) -> None:
    gguf, out = folders
    expected = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == expected.get_vocab()


def test_a_file_that_is_not_all_of_the_model_is_refused(tmp_path: Path) -> None:
    """What is missing transformers would fill with random numbers."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    write_gguf(model, tmp_path / "torn.gguf")
    with pytest.raises(UserError, match=r"lacks 1 tensors .*such as model\.layers\.1\.mlp\.up_proj\.weight"):
        dequantise(tmp_path / "torn.gguf", tmp_path / "torn")
    write_gguf(tiny_llama(), tmp_path / "part.gguf", parts=3)
    with pytest.raises(UserError, match=r"one of 3 parts; join them with llama\.cpp's llama-gguf-split"):
        dequantise(tmp_path / "part.gguf", tmp_path / "part")
