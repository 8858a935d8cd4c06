"""Checkpoints merge from disk to disk: what comes out loads, equals the reference, and is whole or not there."""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import selfdev
from checkpoints import DOWN, HEAD, NORM, TABLE, TENSORS, UP, nano_seed, read, relative, write
from selfdev.algorithms.library import Method, method, methods
from selfdev.archive import Archive, Candidate, Evaluation, Iteration
from selfdev.archive import Run as RunRecord
from selfdev.config import load_config
from selfdev.errors import SelfdevError, UserError
from selfdev.evaluation.evaluator import Evaluator
from selfdev.evaluation.tasks import load_task
from selfdev.merging import writer
from selfdev.merging.checkpoint import merge_checkpoints
from selfdev.merging.recipe import Recipe
from selfdev.merging.task_vectors import merge_by_method, read_task_vectors
from selfdev.models.adapter import adapter_base
from selfdev.models.folder import load_model
from selfdev.sandbox import Sandbox
from selfdev.zoo import zoo_models
from test_models import tiny_llama, write_gguf

CONTEXT = """import torch

def merge_models(model_dict, device, context):
    noise = torch.rand_like(context.seed)
    share = (context.layer + 2) / (context.layers + 1)
    return share * sum(model_dict.values()) + 0.1 * noise * context.seed + 0.01 * len(context.name)
"""


def merged(seed: Path, out: Path, method: str = "task_arithmetic", /, **options: Any) -> dict[str, Tensor]:
    """The tensors of a merge; options that are folders are its experts."""
    experts = {name: options.pop(name) for name in list(options) if isinstance(options[name], Path)}
    selfdev.merge(method, seed, experts, out=out, **options)
    return read(out)


def sum_of(seed: dict[str, Tensor], *experts: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Task Arithmetic by hand, in float32."""
    vectors = {name: sum(expert[name].float() - seed[name].float() for expert in experts) for name in seed}
    return {name: seed[name].float() + scale * vectors[name] for name in seed}


# --- what comes out ---


def test_the_folder_loads_generates_and_has_the_logits_of_a_merge_in_memory(tmp_path: Path) -> None:
    seed = nano_seed()
    experts = {name: relative(seed, tmp_path / name, i) for i, name in enumerate(("one", "two"))}
    (experts["one"] / "README.md").write_text("the expert's own card")

    done = selfdev.merge("task_arithmetic", seed, experts, out=tmp_path / "out", targets="all", scale=0.5)

    reference = AutoModelForCausalLM.from_pretrained(seed)
    state = sum_of(read(seed), *(read(folder) for folder in experts.values()), scale=0.5)
    reference.load_state_dict(state)
    model, tokenizer = (kind.from_pretrained(done.folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer.encode("3+4=")])
    assert (model(ids).logits - reference(ids).logits).abs().max() < 1e-5
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert (done.merged, done.tensors) == (30, 30)
    assert (tmp_path / "out/generation_config.json").read_bytes() == (
        seed / "generation_config.json"
    ).read_bytes()
    for file, digest in done.hashes.items():
        assert hashlib.sha256((done.folder / file).read_bytes()).hexdigest() == digest
    assert list(tmp_path.glob(".*")) == []


def test_shards_in_and_shards_out(tmp_path: Path) -> None:
    seed, one = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    recipe = Recipe("linear", str(seed), {"one": str(one)}, targets="all")
    merge_checkpoints(recipe, tmp_path / "whole")
    merge_checkpoints(recipe, tmp_path / "sharded", shard_bytes=500_000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    for name, tensor in read(tmp_path / "whole").items():
        assert torch.equal(tensor, loaded[name])

    # Once more with the sharded model for a seed: nothing of it changes.
    again = Recipe("linear", str(tmp_path / "sharded"), {"same": str(tmp_path / "sharded")}, targets="all")
    merge_checkpoints(again, tmp_path / "again")
    for name, tensor in read(tmp_path / "again").items():
        assert torch.equal(tensor, loaded[name])


def test_what_is_not_merged_is_the_seeds_bit_for_bit(tmp_path: Path) -> None:
    odd = {"buffer": torch.tensor([3, 4]), "one": torch.tensor(2.5), "none": torch.empty(0, 2)}
    seed = write(tmp_path / "seed", odd)
    expert = write(tmp_path / "expert", {**odd, UP: TENSORS[UP] + 1, NORM: torch.zeros(2)})
    out = merged(seed, tmp_path / "out", x=expert, scale=1.0)
    assert torch.equal(out.pop(UP), TENSORS[UP] + 1)
    assert out.keys() == read(seed).keys() - {UP}
    for name, tensor in out.items():
        assert torch.equal(tensor, read(seed)[name])


@pytest.mark.parametrize(
    ("dtype", "stored"), [(None, torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_types_may_be_mixed_and_are_rounded_once(tmp_path: Path, dtype: Any, stored: torch.dtype) -> None:
    seed = write(
        tmp_path / "seed", {NORM: torch.full((2,), 0.3)}, dtype=torch.bfloat16, torch_dtype="bfloat16"
    )
    half = write(tmp_path / "half", {UP: TENSORS[UP] + 0.3}, dtype=torch.float16)
    full = write(tmp_path / "full", {UP: TENSORS[UP] - 0.1})
    out = merged(seed, tmp_path / "out", half=half, full=full, dtype=dtype, scale=1.0)
    exact = sum_of(read(seed), read(half), read(full), scale=1.0)[UP]
    assert torch.equal(out[UP], exact.to(stored))
    assert {tensor.dtype for tensor in out.values()} == {stored}
    config = json.loads((tmp_path / "out/config.json").read_text())
    if dtype is None:
        assert config["torch_dtype"] == "bfloat16"
    else:
        assert (config["dtype"], "torch_dtype" in config) == (str(stored).removeprefix("torch."), False)


def test_values_beyond_a_type_are_named(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", {UP: torch.full((3, 2), 7e4)})
    with pytest.raises(
        SelfdevError, match=rf"'{UP}' holds values beyond what F16 reaches; write --dtype bf16"
    ):
        merged(seed, tmp_path / "out", x=seed, dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]


def test_the_card_tells_how_to_do_it_again_of_what_and_by_what(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    expert = write(tmp_path / "expert", {UP: TENSORS[UP] + 1})
    merged(seed, tmp_path / "out", "ties", x=expert, density=0.5)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"selfdev merge --method ties --seed {seed} --expert x={expert} -p density=0.5 --targets mlp" in card
    )
    for folder in (seed, expert):
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert "def ties(" in card
    assert "2306.01708" in card
    assert "2 of 4 tensors were merged" in card


# --- the same as in a run ---


@pytest.mark.parametrize(
    "name", ["ties", "dare_linear", *(name for name, each in methods().items() if each.entrywise)]
)
def test_a_method_gives_what_it_gives_in_a_run(tmp_path: Path, name: str) -> None:
    zoo = zoo_models("nano")
    experts = dict(list(zoo["experts"].items())[: method(name).experts or 3])
    vectors = read_task_vectors(zoo["seed"], experts, "mlp")
    expected = merge_by_method(method(name), vectors, {})
    selfdev.merge(name, zoo["seed"], experts, out=tmp_path / "out")
    out = read(tmp_path / "out")
    for parameter, tensor in expected.items():
        assert torch.equal(out[parameter], vectors.seed[parameter] + tensor)


WIDE = (601, 499)  # two parts of which each fills the cache, and a third

IN_PARTS = [
    *((name, {}) for name, each in methods().items() if each.entrywise),
    *((name, {}) for name, each in methods().items() if each.by_parts),
    ("ties", {"density": [0.1, 0.5, 1.0], "weights": [0.5, 0.2, 0.7], "normalize": False, "scale": 0.7}),
    ("ties", {"reading": "mergekit"}),
    ("ties", {"rescale": True}),
    ("breadcrumbs", {"density": 0.3, "outliers": [0.0, 0.1, 0.2], "weights": [0.5, 0.2, 0.7], "elect": True}),
    ("breadcrumbs", {"rescale": True}),
    ("linear", {"weights": [0.5, 0.2, 0.7]}),
    ("weighted_task_arithmetic", {"weights": [0.5, 0.2, 0.7]}),
    ("nearswap", {"t": 1e-7, "reading": "mergekit"}),
]


def wide(folder: Path, number: int, dtype: torch.dtype = torch.bfloat16, **entries: float) -> Path:
    """A folder with one tensor that is merged in parts, some of its entries set."""
    tensor = torch.randn(WIDE, generator=torch.Generator().manual_seed(number))
    for place, value in entries.items():
        tensor.view(-1)[int(place[1:])] = value
    return write(folder, {UP: tensor}, dtype=dtype)


@pytest.mark.parametrize(("name", "parameters"), IN_PARTS)
def test_a_tensor_merged_in_parts_is_the_same_to_the_last_bit(
    tmp_path: Path, name: str, parameters: dict[str, Any]
) -> None:
    seed = wide(tmp_path / "seed", 0)
    experts = {each: wide(tmp_path / each, i) for i, each in enumerate("abc", start=1)}
    vectors = read_task_vectors(seed, experts, "mlp")
    expected = merge_by_method(method(name), vectors, parameters)
    out = merged(seed, tmp_path / "out", name, **experts, dtype="fp32", **parameters)
    for parameter, tensor in expected.items():
        assert torch.equal(out[parameter], vectors.seed[parameter] + tensor)
    rounded = merged(seed, tmp_path / "bf16", name, **experts, **parameters)
    assert torch.equal(rounded[UP], out[UP].bfloat16())


@pytest.mark.parametrize("rest", [1, 5, 63, 64, 65])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "task_arithmetic", "linear"])
def test_parts_of_many_experts_are_the_same_whatever_is_left_at_the_end(
    tmp_path: Path, name: str, rest: int
) -> None:
    def flat(folder: str, number: int, dtype: torch.dtype) -> Path:
        generator = torch.Generator().manual_seed(number)
        return write(tmp_path / folder, {UP: torch.randn((1 << 18) + rest, generator=generator)}, dtype=dtype)

    types = [torch.bfloat16, torch.float16, torch.float32]
    seed = flat("seed", 0, torch.float16)
    experts = {f"e{i}": flat(f"e{i}", i, types[i % 3]) for i in range(1, 9)}
    vectors = read_task_vectors(seed, experts, "mlp")
    [(parameter, expected)] = [
        each for each in merge_by_method(method(name), vectors, {}).items() if each[0] == UP
    ]
    out = merged(seed, tmp_path / "out", name, **experts, dtype="fp32")
    assert torch.equal(out[parameter], vectors.seed[parameter] + expected)


@pytest.mark.parametrize(
    ("name", "parameters", "in_parts"),
    [
        ("ties", {}, True),
        ("breadcrumbs", {}, True),
        ("task_arithmetic", {}, True),
        ("ties", {"reading": "mergekit"}, False),
        ("ties", {"rescale": True}, False),
        ("breadcrumbs", {"rescale": True}, False),
        ("model_stock", {}, False),
    ],
)
def test_what_can_be_is_merged_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parameters: dict[str, Any], in_parts: bool
) -> None:
    seen: list[str] = []
    original = Method.merger_of_parts

    def noted(self: Method, *arguments: Any) -> Any:
        seen.append(self.name)
        return original(self, *arguments)

    monkeypatch.setattr(Method, "merger_of_parts", noted)
    experts = {each: wide(tmp_path / each, i) for i, each in enumerate("abc", start=1)}
    merged(wide(tmp_path / "seed", 0), tmp_path / "out", name, **experts, **parameters)
    assert seen == ([name] if in_parts else [])


def cached(file: Path) -> float:
    """The share of a file's pages that lie in the system's cache."""
    libc = ctypes.CDLL(None)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        begin = ctypes.c_ubyte.from_buffer(mapping)
        libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapping)), pages)
        del begin  # or the mapping could not be closed
        return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "model_stock"])
def test_large_models_pass_through_the_systems_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def large(folder: str, number: int) -> Path:
        tensor = torch.randn(1 << 22, generator=torch.Generator().manual_seed(number))
        return write(tmp_path / folder, {UP: tensor, DOWN: None, TABLE: None}, dtype=torch.bfloat16)

    folders = {"seed": large("seed", 0), "a": large("a", 1), "b": large("b", 2)}
    files = [folder / "model.safetensors" for folder in folders.values()]
    for file in files:  # what has not reached the disk yet cannot leave the cache
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if max(map(cached, files)) > 0.1:
        pytest.skip("nothing leaves the cache of this file system")
    seed, *_ = folders.values()
    experts = {each: folders[each] for each in "ab"}
    kept = merged(seed, tmp_path / "kept", name, **experts)
    assert min(map(cached, [*files, tmp_path / "kept/model.safetensors"])) > 0.9
    monkeypatch.setattr("selfdev.merging.job._PASSING", 0)
    passed = merged(seed, tmp_path / "passed", name, **experts)
    assert max(map(cached, files)) < 0.3
    assert kept.keys() == passed.keys()
    assert all(torch.equal(kept[each], passed[each]) for each in kept)


def test_a_part_that_is_not_finite_is_told_as_a_whole_tensor_is(tmp_path: Path) -> None:
    seed = wide(tmp_path / "seed", 0, n150000=3e38)
    broken = wide(tmp_path / "broken", 1, n150000=torch.inf)
    assert f"expert 'x': its '{UP}' holds values that are not finite" in refusal(
        seed, tmp_path / "out", x=broken
    )
    assert f"the seed: its '{UP}' holds values that are not finite" in refusal(
        broken, tmp_path / "out", x=seed
    )
    opposite = wide(tmp_path / "opposite", 1, n150000=-3e38)
    assert "further from the seed's than float32 reaches" in refusal(seed, tmp_path / "out", x=opposite)
    twice = wide(tmp_path / "twice", 1, n150000=3.3e38)
    with pytest.raises(SelfdevError, match=f"the algorithm makes '{UP}' not finite"):
        merged(seed, tmp_path / "out", x=twice, scale=9.0)
    with pytest.raises(SelfdevError, match=rf"'{UP}' holds values beyond what F16 reaches"):
        merged(seed, tmp_path / "out", x=seed, dtype="fp16")


def test_a_candidate_gives_what_its_run_scored(tmp_path: Path) -> None:
    config = load_config("quickstart", ["iterations=1", "programs=1", "prompt.prompts=1", "seed=3"])
    folder = tmp_path / "run"
    folder.mkdir()
    record = RunRecord(
        "r", "quickstart", 3, "running", config.model_dump(mode="json"), {}, "2030-01-01T00:00:00"
    )
    written = Candidate("learning/1/001", "learning", 0, 0, 0, "text", source=CONTEXT)
    with Archive.create(folder / "archive.db", record) as archive:
        archive.set_questions("development", [("q", "add")])
        archive.add_written(Iteration("learning", 0, 0.9, ("prompt",), 1.0), [written])
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "mlp")
    with Sandbox() as box:
        scored = Evaluator(zoo["seed"], vectors, load_task("nano"), 8, box, 3).merge(written)

    selfdev.merge(f"{folder}:learning/1/001", zoo["seed"], zoo["experts"], out=tmp_path / "out")

    out = read(tmp_path / "out")
    for name, tensor in scored.items():
        assert torch.equal(out[name], vectors.seed[name] + tensor)
    card = (tmp_path / "out/README.md").read_text()
    assert "candidate `learning/1/001` of the run `run`" in card
    assert "Scores hold for these models" in card

    with Archive.open(folder / "archive.db") as archive:
        for kind, number, right, parameters in (
            ("candidate", 0, False, {}),
            ("scaled", 1, True, {"factor": 2.0}),
        ):
            archive.add_evaluation(
                Evaluation(kind, written.name, number, "development", (right,), float(right), 1, parameters)
            )
    selfdev.merge(f"{folder}:learning/1/001", zoo["seed"], zoo["experts"], out=tmp_path / "scaled")
    out = read(tmp_path / "scaled")
    for name, tensor in scored.items():
        assert torch.equal(out[name], vectors.seed[name] + 2.0 * tensor)
    assert "at 2 times its scale" in (tmp_path / "scaled/README.md").read_text()


# --- programs ---


def test_a_file_gives_the_same_in_the_jail_and_trusted(tmp_path: Path) -> None:
    seed, one = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    (tmp_path / "mine.py").write_text(CONTEXT)
    before = torch.get_rng_state()
    outs = [
        merged(seed, tmp_path / f"out{trust}", str(tmp_path / "mine.py"), one=one, trust=trust, targets="all")
        for trust in (False, True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    other = merged(
        seed, tmp_path / "other", str(tmp_path / "mine.py"), one=one, trust=True, targets="all", seed=1
    )
    for name, tensor in outs[0].items():
        assert torch.equal(tensor, outs[1][name])
    assert not torch.equal(other[NORM], outs[0][NORM])


def test_a_trusted_file_may_hold_a_dataclass(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Scale:\n"
        "    by: float = 0.5\n\ndef merge_models(model_dict, device):\n"
        "    return Scale().by * sum(model_dict.values())\n"
    )
    expert = write(tmp_path / "expert", {UP: TENSORS[UP] + 1})
    out = merged(seed, tmp_path / "out", str(tmp_path / "mine.py"), x=expert, trust=True)
    assert torch.equal(out[UP], TENSORS[UP] + 0.5)


def test_a_file_has_the_users_rights_only_if_trusted(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    (tmp_path / "mine.py").write_text(
        f"def merge_models(model_dict, device):\n    open({str(tmp_path / 'made')!r}, 'w')\n    return model_dict['x']\n"
    )
    with pytest.raises(SelfdevError, match=rf"fails on tensor '{UP}' of shape \(3, 2\): "):
        merged(seed, tmp_path / "out", str(tmp_path / "mine.py"), x=seed)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()
    merged(seed, tmp_path / "out", str(tmp_path / "mine.py"), x=seed, trust=True)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1", "returns int"),
        ("return model_dict['x'][0]", r"returns \(2,\)"),
        ("raise KeyError('gone')", "raises KeyError: 'gone'"),
        ("return model_dict['x'].to('meta')", "raises NotImplementedError"),
        ("return model_dict['x'] / 0", f"makes '{UP}' not finite"),
    ],
)
def test_a_trusted_file_that_fails_is_told_where(tmp_path: Path, body: str, message: str) -> None:
    seed = write(tmp_path / "seed")
    (tmp_path / "mine.py").write_text(f"def merge_models(model_dict, device):\n    {body}\n")
    with pytest.raises(SelfdevError, match=message):
        merged(seed, tmp_path / "out", str(tmp_path / "mine.py"), x=seed, trust=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "mine.py",
        "seed",
    ]


# --- sources ---


def to_pickle(folder: Path, *, zipped: bool = True) -> Path:
    """Turn a folder's safetensors into the format of torch.save."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_merge_as_safetensors_do(tmp_path: Path, zipped: bool) -> None:
    seed = write(tmp_path / "seed")
    expert = write(tmp_path / "expert", {UP: TENSORS[UP] * 1.5}, dtype=torch.bfloat16)
    expected = merged(seed, tmp_path / "a", x=expert)
    assert torch.equal(merged(seed, tmp_path / "b", x=to_pickle(expert, zipped=zipped))[UP], expected[UP])
    assert (
        read(tmp_path / "a").keys() == merged(to_pickle(seed, zipped=zipped), tmp_path / "c", x=expert).keys()
    )


def test_a_gguf_file_is_dequantised_once_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO", "selfdev")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "seed")
    write_gguf(model, tmp_path / "expert.gguf")
    for out in ("first", "second"):
        experts = {"x": tmp_path / "expert.gguf"}
        selfdev.merge("linear", tmp_path / "seed", experts, out=tmp_path / out, targets="all")
        for name, tensor in read(tmp_path / out).items():
            error = (tensor - read(tmp_path / "seed")[name]).abs().max()  # of eight bits a weight, in the MLP
            assert error < 1e-3, name
            assert bool(error) == ("mlp" in name), name
    assert sum("dequantising" in message for message in caplog.messages) == 1
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "expert.gguf").read_bytes()[:100])
    with pytest.raises(UserError, match=r"'torn\.gguf' cannot be dequantised"):
        selfdev.merge("linear", tmp_path / "seed", {"x": tmp_path / "torn.gguf"}, out=tmp_path / "out")


class Attack:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("attacked",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seed, expert = write(tmp_path / "seed"), write(tmp_path / "expert")
    (expert / "model.safetensors").unlink()
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({UP: Attack()}, expert / "pytorch_model.bin")
        with pytest.raises(
            UserError, match=r"expert 'x': '.*pytorch_model\.bin' is damaged: it holds more than tensors"
        ):
            merged(seed, tmp_path / "out", x=expert)
    assert not (tmp_path / "attacked").exists()
    torch.save({UP: TENSORS[UP].to_sparse()}, expert / "pytorch_model.bin")
    with pytest.raises(UserError, match="without the plain numbers of weights"):
        merged(seed, tmp_path / "out", x=expert)
    torch.save({UP: 3}, expert / "pytorch_model.bin")
    with pytest.raises(UserError, match="something else than named tensors"):
        merged(seed, tmp_path / "out", x=expert)


LORA = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["up_proj", "q_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["up_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    },
    "anchored pattern": {
        "r": 4,
        "target_modules": ["up_proj"],
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5},
    },
    "whole tensors": {"r": 2, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
}


def lora(base: Path, folder: Path, **config: Any) -> dict[str, Tensor]:
    """Save an adapter with random factors; returns the tensors of the model that peft makes of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config)
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_is_the_model_that_peft_makes_of_it(tmp_path: Path, kind: str) -> None:
    seed = nano_seed()
    expected = lora(seed, tmp_path / "adapter", **LORA[kind])
    out = merged(seed, tmp_path / "out", lora=tmp_path / "adapter", targets="all", scale=1.0)
    assert {name for name in out if not torch.equal(out[name], read(seed)[name])}
    for name, tensor in out.items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name


def test_an_adapter_on_matrices_that_are_stored_both_ways(tmp_path: Path) -> None:
    """GPT-2 stores square matrices the other way round than its head; the adapter's config says but one of both."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=12, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False, vocab_size=20
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "seed")
    expected = lora(
        tmp_path / "seed", tmp_path / "adapter", r=2, target_modules=["attn.c_proj", "c_fc", "lm_head"]
    )
    out = merged(tmp_path / "seed", tmp_path / "out", lora=tmp_path / "adapter", targets="all", scale=1.0)
    for name, tensor in out.items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name
    whole = load_model(tmp_path / "seed", adapter=tmp_path / "adapter").state_dict()
    for name, tensor in out.items():
        assert (tensor - whole[name]).abs().max() < 1e-6, name


def test_an_adapter_on_another_base_than_the_seed(tmp_path: Path) -> None:
    seed, base = nano_seed(), relative(nano_seed(), tmp_path / "base", 2)
    expected = lora(base, tmp_path / "adapter", r=2, target_modules=["up_proj"])
    config = tmp_path / "adapter/adapter_config.json"
    named = merged(seed, tmp_path / "named", lora=tmp_path / "adapter", targets="all", scale=1.0)
    for name, tensor in named.items():
        assert (tensor - expected[name]).abs().max() < 1e-6
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(
        UserError, match=r"was trained on '/gone', which cannot be had: [^\n]*\nName the base yourself"
    ):
        merged(seed, tmp_path / "out", lora=tmp_path / "adapter")
    selfdev.merge(
        "linear", seed, {"x": f"{tmp_path / 'adapter'}+{base}"}, out=tmp_path / "out", targets="all"
    )
    for name, tensor in read(tmp_path / "out").items():
        assert (tensor - expected[name]).abs().max() < 1e-6
    turned = {"x": f"{base}+{tmp_path / 'adapter'}"}  # as mergekit writes it
    selfdev.merge("linear", seed, turned, out=tmp_path / "turned", targets="all")
    assert read(tmp_path / "turned").keys() == read(tmp_path / "out").keys()
    assert all(
        torch.equal(tensor, read(tmp_path / "out")[n]) for n, tensor in read(tmp_path / "turned").items()
    )
    with pytest.raises(UserError, match=r"has no adapter_config\.json, so it has no base"):
        selfdev.merge("linear", seed, {"x": f"{base}+{base}"}, out=tmp_path / "other")


def test_an_adapters_base_is_that_of_its_revision(tmp_path: Path) -> None:
    lora(nano_seed(), tmp_path / "adapter", r=2, target_modules=["up_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    for name, revision, base in (
        ("org/base", "v1.0", "org/base@v1.0"),
        ("org/base", "main", "org/base"),
        ("org/base", None, "org/base"),
        (str(tmp_path), "v1.0", str(tmp_path)),
    ):
        said = {"base_model_name_or_path": name, "revision": revision}
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
        assert adapter_base(tmp_path / "adapter") == base


def test_a_trusted_file_cannot_change_the_seed(tmp_path: Path) -> None:
    seed = nano_seed()
    (tmp_path / "mine.py").write_text(
        "def merge_models(model_dict, device, context):\n    context.seed.mul_(0)\n    return context.seed\n"
    )
    expert = relative(seed, tmp_path / "one", 1)
    out = merged(seed, tmp_path / "out", str(tmp_path / "mine.py"), x=expert, trust=True, targets="all")
    for name, tensor in read(seed).items():
        torch.testing.assert_close(out[name], tensor, rtol=0, atol=0)


def test_the_code_of_a_tokenizer_comes_along(tmp_path: Path) -> None:
    seed = Path(shutil.copytree(nano_seed(), tmp_path / "seed"))
    (seed / "tokenization_mine.py").write_text("# a class\n")
    expert = relative(seed, tmp_path / "one", 1)
    merged(seed, tmp_path / "without", x=expert)
    assert not (tmp_path / "without" / "tokenization_mine.py").exists()
    config = seed / "tokenizer_config.json"
    known = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps(known | {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}))
    merged(seed, tmp_path / "with", x=expert)
    assert (tmp_path / "with" / "tokenization_mine.py").read_text() == "# a class\n"


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path: Path) -> None:
    seed = nano_seed()
    adapter = tmp_path / "adapter"
    lora(seed, adapter, r=2, target_modules=["up_proj"], use_dora=True)
    with pytest.raises(UserError, match="use_dora, which is no plain LoRA; merge it into its base with peft"):
        merged(seed, tmp_path / "out", x=adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lora_magnitude_vector"):
        merged(seed, tmp_path / "out", x=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(UserError, match="init_lora_weights pissa_niter_4, for which peft changes the base"):
        merged(seed, tmp_path / "out", x=adapter)
    for field, value in (
        ("init_lora_weights", "lora_ga"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(UserError, match=field):
            merged(seed, tmp_path / "out", x=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="is of kind LOHA"):
        merged(seed, tmp_path / "out", x=adapter)
    with pytest.raises(UserError, match="is a LoRA adapter and a whole model is needed"):
        merged(adapter, tmp_path / "out", x=seed)


def test_an_adapter_may_lie_beside_its_bases_config(tmp_path: Path) -> None:
    seed = nano_seed()
    expected = lora(seed, tmp_path / "adapter", r=2, target_modules=["up_proj"])
    shutil.copy(seed / "config.json", tmp_path / "adapter")
    out = merged(seed, tmp_path / "out", x=tmp_path / "adapter", scale=1.0)
    assert all((tensor - expected[name]).abs().max() < 1e-6 for name, tensor in out.items())


def of_ones(folder: Path, whole: dict[str, Tensor], size: float = 1.0) -> Path:
    """An adapter that adds ones to one tensor, and has others whole."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    tensors = {UP.replace("weight", "lora_A.weight"): torch.full((1, 2), size)}
    tensors |= {UP.replace("weight", "lora_B.weight"): torch.ones(3, 1), **whole}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_an_adapter_with_tokens_of_its_own(tmp_path: Path) -> None:
    """peft keeps embeddings and head whole once the vocabulary has grown; a tied base has no place for the head."""
    longer = torch.cat([TENSORS[TABLE] + 1, torch.full((2, 2), 9.0)])
    untied = write(tmp_path / "untied", {HEAD: TENSORS[TABLE] * 2})
    tied = write(tmp_path / "tied", tie_word_embeddings=True)
    whole = {TABLE: longer, HEAD: longer.clone()}
    adapter = of_ones(tmp_path / "adapter", whole)
    for seed in (untied, tied):
        name = seed.name
        out = merged(seed, tmp_path / f"{name}-mlp", x=adapter, scale=1.0)
        assert torch.equal(out[UP], TENSORS[UP] + 1)
        message = refusal(seed, tmp_path / "no", x=adapter, targets="all")
        assert "has 6 rows and the seed's has 4" in message
        assert "--embeddings crop" in message
        out = merged(seed, tmp_path / f"{name}-crop", x=adapter, targets="all", embeddings="crop", scale=1.0)
        assert torch.equal(out[TABLE], TENSORS[TABLE] + 1)
        assert (HEAD in out) == (seed == untied)
    other = of_ones(tmp_path / "other", whole | {HEAD: longer + 1})
    assert "trained an output head" in refusal(tied, tmp_path / "no", x=other)


def test_an_adapter_that_is_broken_or_whose_base_is_packed(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    broken = of_ones(tmp_path / "broken", {}, size=torch.nan)
    assert f"expert 'x': what its adapter adds to '{UP}' is not finite" in refusal(
        seed, tmp_path / "out", x=broken
    )
    packed = write(
        tmp_path / "packed", {UP: torch.zeros(3, 1, dtype=torch.uint8)}, quantization_config={"bits": 4}
    )
    adapter = of_ones(tmp_path / "adapter", {})
    with pytest.raises(
        UserError, match=r"its adapter was trained on '.*packed', whose weights are quantised.*\+BASE"
    ):
        selfdev.merge("linear", seed, {"x": f"{adapter}+{packed}"}, out=tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora(nano_seed(), tmp_path / "adapter", r=2, target_modules=["up_proj"])
    seed = write(tmp_path / "seed")
    with pytest.raises(
        UserError, match=rf"changes '{UP}' as of shape \(368, 96\), and its base's has \(3, 2\)"
    ):
        selfdev.merge("linear", seed, {"x": f"{tmp_path / 'adapter'}+{seed}"}, out=tmp_path / "out")


# --- what does not fit ---


def refusal(seed: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        merged(seed, out, **options)
    assert not out.exists()
    return str(raised.value)


def test_models_that_do_not_fit_are_named_with_the_reason(tmp_path: Path) -> None:
    seed, out = write(tmp_path / "seed"), tmp_path / "out"
    other = write(tmp_path / "other", num_hidden_layers=3)
    assert "expert 'x': its config says num_hidden_layers 3 and the seed's says 2" in refusal(
        seed, out, x=other
    )
    missing = write(tmp_path / "missing", {UP: None})
    assert f"it has no tensor '{UP}'" in refusal(seed, out, x=missing)
    for begun, other in (("_orig_mod.", f"_orig_mod.{UP}"), ("", UP.removeprefix("model."))):
        renamed = write(tmp_path / f"renamed {begun}", {UP: None, other: TENSORS[UP]})
        said = refusal(seed, out, x=renamed)
        assert f"it has '{other}', so the names of one of the two begin otherwise" in said
        assert "load expert 'x' by AutoModelForCausalLM" in said
    bare = write(tmp_path / "bare", {UP: None, UP.removeprefix("model."): TENSORS[UP]})
    assert "load the seed by AutoModelForCausalLM" in refusal(bare, out, x=write(tmp_path / "whole"))
    one, pack = "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.up_proj"
    mixture = write(tmp_path / "mixture", {one: TENSORS[UP]})
    assert "experts one by one, the other packed" in refusal(
        mixture, out, x=write(tmp_path / "pack", {pack: TENSORS[UP][None]})
    )
    extra = write(tmp_path / "extra", {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, 2)})
    assert (
        "it has a tensor 'model.layers.2.mlp.up_proj.weight' of shape (3, 2) and the seed has none"
        in refusal(seed, out, x=extra)
    )
    packed = write(tmp_path / "packed", {UP: torch.zeros(3, 2, dtype=torch.int8)})
    assert f"its '{UP}' is stored as I8" in refusal(seed, out, x=packed)
    quantised = write(tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "weights are quantised by gptq" in refusal(seed, out, x=quantised)
    assert "the seed: its config says that its weights are quantised" in refusal(quantised, out, x=seed)
    broken = write(tmp_path / "broken", {UP: torch.full((3, 2), torch.nan)})
    assert f"expert 'x': its '{UP}' holds values that are not finite" in refusal(seed, out, x=broken)
    pointer = write(tmp_path / "pointer")
    (pointer / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "it is a pointer of Git LFS, and `git lfs pull` fetches" in refusal(seed, out, x=pointer)
    torn = write(tmp_path / "torn")
    whole = (torn / "model.safetensors").read_bytes()
    headers = [b"[" * 5000, b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}}']
    ill = [len(header).to_bytes(8, "little") + header for header in headers]
    for damaged in (b"", b"torn", whole[:200], whole[:-1], b"\xff" * 20, *ill):
        (torn / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors' is damaged" in refusal(seed, out, x=torn)


def test_experts_that_compute_otherwise_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = write(tmp_path / "seed", rope_theta=1e4, rms_norm_eps=1e-5)
    # Newer versions of transformers write it so.
    same = write(tmp_path / "same", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    merged(seed, tmp_path / "quiet", x=same)
    assert "its config says" not in caplog.text
    other = write(
        tmp_path / "other", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, rms_norm_eps=1e-6
    )
    merged(seed, tmp_path / "told", x=other)
    assert (
        "expert 'x': its config says rms_norm_eps 1e-06 (the seed's 1e-05) and rope_theta 1000000.0 (the seed's "
        "10000.0); the merged model computes as the seed's says" in caplog.text
    )


def test_the_text_models_inside_must_fit_too(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", model_type="gemma3", text_config={"num_attention_heads": 8})
    other = write(tmp_path / "other", model_type="gemma3", text_config={"num_attention_heads": 4})
    assert "its config says num_attention_heads 4 and the seed's says 8" in refusal(
        seed, tmp_path / "out", x=other
    )


def test_the_tokenizer_may_be_an_experts(tmp_path: Path) -> None:
    seed = nano_seed()
    chat = relative(seed, tmp_path / "chat", 1)
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    for tokenizer in ("x", str(chat)):
        out = tmp_path / f"by {Path(tokenizer).name}"
        selfdev.merge("linear", seed, {"x": chat}, out=out, tokenizer=tokenizer)
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        assert f"--tokenizer {tokenizer}" in (out / "README.md").read_text()
    selfdev.merge("linear", seed, {"x": chat}, out=tmp_path / "plain")
    assert not (tmp_path / "plain/chat_template.jinja").exists()
    (chat / "tokenizer.json").write_text((chat / "tokenizer.json").read_text().replace('"+"', '"plus"'))
    with pytest.raises(UserError, match="another token than the seed"):
        selfdev.merge("linear", seed, {"x": chat}, out=tmp_path / "other", tokenizer="x")


def test_an_only_expert_that_is_the_seed_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = write(tmp_path / "seed")
    merged(seed, tmp_path / "out", x=seed)
    assert "expert 'x' has the weights of the seed" in caplog.text


def test_tensors_that_are_not_merged_need_not_be_there(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    expert = write(
        tmp_path / "expert",
        {NORM: None, TABLE: None, "value_head.weight": torch.ones(1), UP: TENSORS[UP] + 1},
    )
    assert torch.equal(merged(seed, tmp_path / "out", x=expert, scale=1.0)[UP], TENSORS[UP] + 1)


LONGER = torch.cat([TENSORS[TABLE] + 1, torch.full((2, 2), 9.0)])


def test_vocabularies_of_different_sizes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", {HEAD: TENSORS[TABLE] * 2})
    longer = write(tmp_path / "longer", {TABLE: LONGER, HEAD: LONGER, UP: TENSORS[UP] + 1}, vocab_size=6)
    message = refusal(seed, tmp_path / "out", x=longer, targets="all")
    assert (
        f"its '{TABLE}' has 6 rows and the seed's has 4" in message or f"its '{HEAD}' has 6 rows" in message
    )
    assert "--embeddings seed keeps the seed's, --embeddings crop merges the first 4 rows" in message

    kept = merged(seed, tmp_path / "seed's", x=longer, targets="all", embeddings="seed", scale=1.0)
    assert torch.equal(kept[TABLE], TENSORS[TABLE])
    assert torch.equal(kept[HEAD], TENSORS[TABLE] * 2)
    assert torch.equal(kept[UP], TENSORS[UP] + 1)

    cropped = merged(seed, tmp_path / "cropped", x=longer, targets="all", embeddings="crop", scale=1.0)
    assert torch.equal(cropped[TABLE], TENSORS[TABLE] + 1)
    assert torch.equal(cropped[HEAD], TENSORS[TABLE] + 1)

    # The other way round, the seed's further rows stay.
    swapped = merged(longer, tmp_path / "swapped", x=seed, targets="all", embeddings="crop", scale=1.0)
    assert torch.equal(swapped[TABLE], torch.cat([TENSORS[TABLE], LONGER[4:]]))


def test_cropped_tensors_must_fit_but_for_their_rows(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", {HEAD: TENSORS[TABLE] * 2})
    longer = write(tmp_path / "longer", {TABLE: LONGER, HEAD: LONGER})
    crop: dict[str, Any] = {"targets": "all", "embeddings": "crop"}
    headless = write(tmp_path / "headless")
    assert f"expert 'y': it has no tensor '{HEAD}'" in refusal(
        seed, tmp_path / "out", x=longer, y=headless, **crop
    )
    packed = write(tmp_path / "packed", {TABLE: LONGER.to(torch.int8), HEAD: LONGER})
    assert f"its '{TABLE}' is stored as I8" in refusal(seed, tmp_path / "out", x=packed, **crop)


@pytest.mark.parametrize(
    "broken",
    [
        {"lora_alpha": None},
        {"lora_alpha": "x"},
        {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": [1]},
    ],
)
def test_an_adapter_without_a_scale_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    seed, adapter = write(tmp_path / "seed"), of_ones(tmp_path / "adapter", {})
    config = json.loads((adapter / "adapter_config.json").read_text()) | broken
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(seed, tmp_path / "out", x=adapter)
    assert "lora_alpha or alpha_pattern in" in message
    assert "makes no scale" in message


def test_vocabularies_without_a_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = write(tmp_path / "seed")
    expert = write(tmp_path / "expert", {TABLE: TENSORS[TABLE] + 1})
    (seed / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2}))
    merged(seed, tmp_path / "none", x=expert, targets="all")
    assert "tells which token a row of the embeddings is for; they are merged row by row" in caplog.text
    (expert / "vocab.json").write_text(json.dumps({"a": 0, "c": 1, "b": 2}))
    message = refusal(seed, tmp_path / "out", x=expert, targets="all")
    assert "another token in 2 rows of the embeddings (row 1: 'c', the seed's 'b')" in message


def test_added_tokens_with_other_names_are_merged_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = write(tmp_path / "seed")
    expert = write(tmp_path / "expert", {TABLE: TENSORS[TABLE] + 1})
    for folder, last in ((seed, "<reserved>"), (expert, "<|im_start|>")):
        added = [{"id": 3, "content": last}]
        tokenizer = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = merged(seed, tmp_path / "out", x=expert, targets="all", scale=1.0)
    assert torch.equal(out[TABLE], TENSORS[TABLE] + 1)
    assert "expert 'x': 1 added tokens have other names" in caplog.text
    assert "(row 3: '<|im_start|>', the seed's '<reserved>')" in caplog.text


def test_vocabularies_of_one_size_with_other_tokens(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    expert = write(tmp_path / "expert", {TABLE: TENSORS[TABLE] + 1, UP: TENSORS[UP] + 1})
    for folder, third in ((seed, "c"), (expert, "x")):
        vocabulary = {"a": 0, "b": 1, third: 2}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    message = refusal(seed, tmp_path / "out", x=expert, targets="all")
    assert "another token in 1 rows of the embeddings (row 2: 'x', the seed's 'c')" in message
    for name, options in (("mlp", {}), ("kept", {"targets": "all", "embeddings": "seed"})):
        out = merged(seed, tmp_path / name, x=expert, scale=1.0, **options)
        assert torch.equal(out[TABLE], TENSORS[TABLE])
        assert torch.equal(out[UP], TENSORS[UP] + 1)


def test_tied_heads_stored_or_not(tmp_path: Path) -> None:
    tied = write(tmp_path / "tied", tie_word_embeddings=True)
    both = write(tmp_path / "both", {HEAD: TENSORS[TABLE].clone()}, tie_word_embeddings=True)
    changed = write(tmp_path / "changed", {TABLE: TENSORS[TABLE] + 1}, tie_word_embeddings=True)
    untied = write(tmp_path / "untied", {HEAD: TENSORS[TABLE] + 2})
    # A head that only repeats the embeddings is not written, and experts that store one fit all the same.
    for name, seed in (("a", tied), ("b", both)):
        out = merged(seed, tmp_path / name, one=changed, two=both, targets="all", scale=1.0)
        assert HEAD not in out
        assert torch.equal(out[TABLE], TENSORS[TABLE] + 1)
    # A seed with a head of its own takes a tied expert's embeddings for its head.
    out = merged(untied, tmp_path / "c", x=changed, targets="all", scale=1.0)
    assert torch.equal(out[HEAD], TENSORS[TABLE] + 1)
    # The other way round there is nowhere to put the expert's head.
    message = refusal(tied, tmp_path / "d", x=untied, targets="all")
    assert (
        f"its output head '{HEAD}' differs from its embeddings, and the seed ties the two; --embeddings seed"
        in message
    )
    assert HEAD not in merged(tied, tmp_path / "d", x=untied, targets="all", embeddings="seed")


def test_a_config_that_does_not_say_whether_heads_are_tied(tmp_path: Path) -> None:
    """Older ones leave it to the architecture: Gemma's are tied, Llama's are not."""
    head = {HEAD: TENSORS[TABLE].clone()}
    gemma, expert = (
        write(tmp_path / "gemma", head, model_type="gemma"),
        write(tmp_path / "expert", {TABLE: TENSORS[TABLE] + 1}, model_type="gemma"),
    )
    out = merged(gemma, tmp_path / "out", x=expert, targets="all", scale=1.0)
    assert torch.equal(out[TABLE], TENSORS[TABLE] + 1)
    assert HEAD not in out
    assert "it has no tensor 'lm_head.weight'" in refusal(
        write(tmp_path / "llama", head), tmp_path / "no", x=write(tmp_path / "headless"), targets="all"
    )


def test_nothing_to_merge_is_no_merge(tmp_path: Path) -> None:
    tied = write(tmp_path / "tied", {HEAD: TENSORS[TABLE].clone()}, tie_word_embeddings=True)
    assert "nothing would be merged" in refusal(tied, tmp_path / "out", x=tied, targets="lm_head")
    assert "nothing would be merged" in refusal(
        tied, tmp_path / "out", x=tied, targets="embed_tokens", embeddings="seed"
    )


def test_an_expert_may_be_called_seed(tmp_path: Path) -> None:
    seed, expert = write(tmp_path / "one"), write(tmp_path / "two", {UP: TENSORS[UP] + 1})
    selfdev.merge("linear", seed, {"seed": expert}, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for folder in (seed, expert):
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card


def test_an_empty_folder_may_be_the_place(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    (tmp_path / "here").mkdir()
    selfdev.merge("linear", seed, {"x": seed}, out=tmp_path / "here")
    assert read(tmp_path / "here").keys() == TENSORS.keys()


# --- whole or not there ---


def test_a_disk_known_to_be_full_is_told_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = write(tmp_path / "seed")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "takes 67 MB and 0 MB are free; make room" in refusal(seed, tmp_path / "out", x=seed)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seed = write(tmp_path / "seed")
    calls = []

    def write_some(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(code, os.strerror(code))
        return os.pwrite(descriptor, data, sum(calls[:-1]))

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(SelfdevError, match=r"no room|cannot be written"):
        merged(seed, tmp_path / "out", x=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]


@pytest.mark.parametrize("place", [10, 5000])
def test_a_disk_that_keeps_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    seed = write(tmp_path / "seed")
    sync = os.fdatasync

    def damage(descriptor: int) -> None:
        os.pwrite(descriptor, b"\x7f", place)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", damage)
    with pytest.raises(SelfdevError, match="reads back from the disk differently"):
        merged(seed, tmp_path / "out", x=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]


def test_what_fails_or_differs_behind_the_place_of_writing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, sync = write(tmp_path / "seed"), os.fdatasync
    monkeypatch.setattr(writer, "_PIECE", 16)  # bytes, of which the file has several hundred

    def damage(descriptor: int) -> None:
        os.pwrite(descriptor, b"\x7f", 300)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", damage)
    with pytest.raises(SelfdevError, match="reads back from the disk differently"):
        merged(seed, tmp_path / "out", x=seed)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(SelfdevError, match="cannot be written into"):
        merged(seed, tmp_path / "out", x=seed)
    monkeypatch.setattr(os, "fdatasync", sync)
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]
    assert merged(seed, tmp_path / "out", x=seed)


STOPPED = """
import os, signal, sys
import selfdev
from selfdev.merging import writer

flush, calls = os.fsync, []

def stop(descriptor):
    os.kill(os.getpid(), int(sys.argv[3]))
    flush(descriptor)

os.fsync = stop  # called once all files are written, before the folder gets its name
selfdev.merge("linear", sys.argv[1], {"x": sys.argv[1]}, out=sys.argv[2])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_merge_that_is_stopped_leaves_no_folder_of_that_name(
    tmp_path: Path, number: signal.Signals
) -> None:
    seed = write(tmp_path / "seed")
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(seed), str(tmp_path / "out"), str(int(number))],
        capture_output=True,
    )
    assert done.returncode != 0
    left = {path.name for path in tmp_path.iterdir()} - {"seed"}
    if number == signal.SIGINT:
        assert not left
    assert all(name.startswith(".out.") for name in left)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    seed = write(tmp_path / "seed")
    (tmp_path / "empty").mkdir()
    expected = read(seed).keys()
    assert merged(seed, tmp_path / "empty", x=seed).keys() == expected
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        merged(seed, tmp_path / "empty", x=seed)
    with pytest.raises(UserError, match="is a file, and"):
        merged(seed, seed / "config.json" / "out", x=seed)
    assert merged(seed, tmp_path / "new" / "folder", x=seed).keys() == expected


# --- memory ---

MEASURED = """
import sys
from pathlib import Path
import selfdev.merging.checkpoint
import torch

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

torch.ones(1 << 20).add_(1)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
selfdev.merge("task_arithmetic", sys.argv[1], {"a": sys.argv[1], "b": sys.argv[2]}, out=sys.argv[3])
print(status("VmHWM") - before)
"""


def test_memory_follows_the_largest_tensor_and_not_the_model(tmp_path: Path) -> None:
    """Three files of 600 MB, in tensors of 8 MB in float32: below four of these for each expert, and 500 MB."""
    half = torch.full((2048, 1024), 0.5)
    big = {f"model.layers.{i}.mlp.up_proj.weight": half.clone() for i in range(144)}
    seed = write(tmp_path / "seed", big, dtype=torch.bfloat16)
    shutil.copytree(seed, tmp_path / "expert")
    command = [sys.executable, "-c", MEASURED, str(seed), str(tmp_path / "expert"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 8 < float(done.stdout) < 500


PEAKS = """
import json, shutil, sys
from pathlib import Path
import selfdev.merging.checkpoint
import torch
from selfdev.algorithms.library import methods

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

seed, expert, out = map(Path, sys.argv[1:])
torch.ones(1 << 20).add_(1)
for name, method in methods().items():
    for count in [method.experts] if method.experts else [2, 3]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        selfdev.merge(name, seed, {f"e{i}": expert for i in range(count)}, out=out)
        print(json.dumps([name, count, status("VmHWM") - before]), flush=True)
        shutil.rmtree(out)
"""

WORKED_IN = """
import json, sys
import torch
from selfdev.algorithms.library import method

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

small = torch.randn(2, 400, 500)
for name in sys.argv[1:]:
    for experts, *shape in ((2, 768, 2064), (3, 2064, 768)):
        method(name).merge(small, small[0])  # what libraries keep for themselves
        generator = torch.Generator().manual_seed(0)
        vectors = torch.empty(experts, *shape).normal_(generator=generator)
        before = status("VmRSS") - vectors.nbytes / 2**20
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        method(name).merge(vectors, vectors[0])
        print(json.dumps([name, shape, experts, status("VmHWM") - before]), flush=True)
        del vectors
"""


def test_methods_that_take_a_matrix_apart_stay_near_the_promise() -> None:
    """In the shapes that MLPs have. KnOTS is the one that needs more than four tensors for each expert and three."""
    names = ["doge_ta", "iso_c", "iso_cts", "knots", "svc", "tsv_m", "wudi"]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "500000"}
    command = [sys.executable, "-c", WORKED_IN, *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(names) * 2
    tensor = 768 * 2064 * 4 / 2**20
    for name, shape, experts, grown in found:
        assert grown < (4 * experts + 9) * tensor + 10, (name, shape, experts)


def test_knots_of_large_matrices_takes_less_memory() -> None:
    """As of an MLP with a side of 16384 and more, here taken for large."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "500000"}
    large = "import selfdev.algorithms.library.spectrum as s\ns._LARGE = 100\n" + WORKED_IN
    command = [sys.executable, "-c", large, "knots"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads)
    *_, (_, shape, experts, grown) = map(json.loads, done.stdout.splitlines())
    assert grown < (4 * experts + 3) * 768 * 2064 * 4 / 2**20 + 10, (shape, experts)


NARROW = (1 << 17, 64)  # 32 MB in float32, of which singular values are found in a moment


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """By how many MB the process grew at the most, for each method and number of experts merged."""
    folder = tmp_path_factory.mktemp("peaks")
    generator = torch.Generator().manual_seed(0)
    tensors = {DOWN: None, TABLE: None, UP: torch.randn(NARROW, generator=generator)}
    seed = write(folder / "seed", tensors, dtype=torch.bfloat16)
    expert = write(
        folder / "expert", {**tensors, UP: torch.randn(NARROW, generator=generator)}, dtype=torch.bfloat16
    )
    command = [sys.executable, "-c", PEAKS, str(seed), str(expert), str(folder / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[int, float]] = {}
    for name, experts, grown in map(json.loads, done.stdout.splitlines()):
        found.setdefault(name, {})[experts] = grown
    return found


@pytest.mark.parametrize("name", methods())
def test_a_method_keeps_the_promise_of_memory(peaks: dict[str, dict[int, float]], name: str) -> None:
    """Below four of the largest tensors for each expert, and something for threads."""
    assert peaks[name]
    for experts, grown in peaks[name].items():
        assert grown < 4 * experts * 32 + 40


# --- properties ---


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([name for name, each in methods().items() if each.experts is None]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shape=st.sampled_from([(1,), (1, 1), (3, 2), (2, 5)]),
    experts=st.integers(1, 3),
)
def test_experts_that_are_the_seed_give_the_seed(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    experts: int,
) -> None:
    folder = tmp_path_factory.mktemp("same")
    tensor = torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape)
    seed = write(folder / "seed", {UP: tensor, DOWN: None}, dtype=dtype)
    out = merged(seed, folder / "out", name, **{f"e{i}": seed for i in range(experts)})
    assert torch.equal(out[UP], read(seed)[UP])


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(["a", "b", "c"]),
    name=st.sampled_from(["task_arithmetic", "ties", "magmax", "linear"]),
)
def test_the_order_of_experts_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], name: str
) -> None:
    folder = tmp_path_factory.mktemp("order")
    seed = write(folder / "seed")
    experts = {each: write(folder / each, {UP: TENSORS[UP] * (1 + i / 4)}) for i, each in enumerate("abc")}
    first = merged(seed, folder / "first", name, **experts)
    second = merged(seed, folder / "second", name, **{each: experts[each] for each in order})
    assert (first[UP] - second[UP]).abs().max() < 1e-5
