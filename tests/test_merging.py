"""Task vectors come from folders as they are, merge tensor by tensor, and leave the seed as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfdev.algorithms.library import method
from selfdev.errors import UserError
from selfdev.merging.apply import applied
from selfdev.merging.reader import is_finite
from selfdev.merging.task_vectors import (
    TaskVectors,
    merge_by_method,
    read_task_vectors,
    select_targets,
)
from selfdev.models.folder import load_model
from selfdev.zoo import zoo_models

UP, DOWN = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"
QUERY = "layers.0.self_attn.q_proj.weight"
CONFIG = {"model_type": "llama", "hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
TENSORS = {
    UP: torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    DOWN: torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.5, 0.0]]),
    QUERY: torch.eye(2),
    "embed_tokens.weight": torch.zeros(4, 2),
    "norm.weight": torch.ones(2),
}


def write_model(folder: Path, changes: dict[str, Tensor | None] | None = None, **config: object) -> Path:
    """A folder with the tensors above, some replaced, added or (None) left out."""
    tensors = {name: tensor for name, tensor in (TENSORS | (changes or {})).items() if tensor is not None}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def shard(folder: Path) -> Path:
    """Turn a folder's one file into two and their index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def vectors_of(seed: dict[str, Tensor], **experts: dict[str, Tensor]) -> TaskVectors:
    return TaskVectors(seed, tuple(experts), {name: {e: experts[e][name] for e in experts} for name in seed})


class Tiny(nn.Module):
    """One parameter that is merged, one that is not."""

    def __init__(self, values: Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.a = nn.Parameter(values.to(dtype, copy=True))
        self.b = nn.Parameter(torch.ones(2, dtype=dtype))


# --- targets ---

LLAMA = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.self_attn.q_norm.weight": (2,),
    "model.layers.0.self_attn.o_proj.weight": (4, 4),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (1,),
    "model.layers.0.mlp.gate_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.bias": (6,),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "lm_head.weight": (8, 4),
}


def test_targets_of_llama():
    assert select_targets(LLAMA, "mlp") == [
        f"model.layers.0.mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")
    ]
    assert select_targets(LLAMA, "attention") == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ]
    # The rotary frequencies follow from the config.
    assert select_targets(LLAMA, "all") == [name for name in LLAMA if "rotary" not in name]
    assert select_targets(LLAMA, r"layers\.\d+\..*norm") == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ]


@pytest.mark.parametrize(
    ("name", "is_mlp"),
    [
        ("h.0.mlp.c_fc.weight", True),  # GPT-2
        ("h.0.mlp.c_proj.weight", True),
        ("h.0.attn.c_proj.weight", False),
        ("model.decoder.layers.0.fc1.weight", True),  # OPT
        ("model.layers.0.mlp.fc2.weight", True),  # Phi
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", True),
        ("model.layers.0.mlp.gate_up_proj.weight", True),  # Phi-3
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", True),  # Mixtral
        ("model.layers.0.block_sparse_moe.gate.weight", False),  # the router
        ("model.layers.0.mlp.experts.3.down_proj.weight", True),  # Qwen MoE
        ("model.layers.0.mlp.experts.gate_up_proj", True),  # fused
        ("model.layers.0.mlp.gate.weight", False),
    ],
)
def test_mlp_of_other_families(name, is_mlp):
    other = "x.mlp.up_proj.weight"
    assert select_targets({name: (4, 4), other: (4, 4)}, "mlp") == ([name, other] if is_mlp else [other])


def test_targets_that_select_nothing_show_names():
    with pytest.raises(UserError) as raised:
        select_targets(LLAMA, "mpl")
    assert "targets 'mpl' selects no parameter; use mlp, attention, all" in str(raised.value)
    assert "model.embed_tokens.weight" in str(raised.value)
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        select_targets(LLAMA, "(")


# --- reading ---


def test_a_task_vector_is_expert_minus_seed(tmp_path):
    up, down = TENSORS[UP] + torch.tensor([0.5, -1.0]), TENSORS[DOWN] * 2
    seed = write_model(tmp_path / "seed")
    experts = {
        "second": write_model(tmp_path / "second", {UP: up.bfloat16(), QUERY: torch.ones(2, 2)}),
        "first": shard(write_model(tmp_path / "first", {DOWN: down})),
    }

    vectors = read_task_vectors(seed, experts, "mlp")

    assert vectors.experts == ("second", "first")
    assert set(vectors.seed) == set(vectors.vectors) == {UP, DOWN}
    assert torch.equal(vectors.seed[UP], TENSORS[UP])
    assert vectors.vectors[UP]["second"].tolist() == [[0.5, -1.0]] * 3
    assert not vectors.vectors[UP]["first"].any()
    assert vectors.vectors[DOWN]["first"].tolist() == [[1.0, 0.0, -1.0], [2.0, 0.5, 0.0]]
    assert vectors.stacked(DOWN).shape == (2, 2, 3)
    assert torch.equal(vectors.stacked(DOWN)[1], vectors.vectors[DOWN]["first"])
    assert {each.dtype for of in vectors.vectors.values() for each in of.values()} == {torch.float32}


def test_the_zoo_reads_as_its_models_load():
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "mlp")
    folders = zoo["seed"], zoo["experts"]["add"]
    seed, add = (dict(load_model(folder).named_parameters()) for folder in folders)
    assert len(vectors.seed) == 9
    for name in vectors.seed:
        assert torch.equal(vectors.seed[name], seed[name])
        assert torch.equal(vectors.vectors[name]["add"], add[name] - seed[name])
    assert sum(vectors.vectors[name]["add"].norm() for name in vectors.seed) > 1


def test_what_is_not_merged_may_differ(tmp_path):
    """An expert with a longer vocabulary, and one that an older version saved."""
    seed = write_model(tmp_path / "seed")
    experts = {
        "long": write_model(tmp_path / "long", {"embed_tokens.weight": torch.zeros(6, 2)}, vocab_size=6),
        "old": write_model(tmp_path / "old", {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}),
    }
    assert set(read_task_vectors(seed, experts, "mlp").seed) == {UP, DOWN}
    with pytest.raises(UserError, match=r"expert 'long': its 'embed_tokens\.weight' has shape \(6, 2\)"):
        read_task_vectors(seed, experts, "all")
    del experts["long"]
    assert set(read_task_vectors(seed, experts, "all").seed) == set(TENSORS)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"hidden_size": 4096}, "its config says hidden_size 4096 and the seed's says 2"),
        ({}, {"model_type": "qwen2"}, "its config says model_type qwen2 and the seed's says llama"),
        ({UP: torch.zeros(5, 2)}, {}, f"its '{UP}' has shape (5, 2) and the seed's has (3, 2)"),
        ({UP: None}, {}, f"it has no tensor '{UP}' and the seed has one of shape (3, 2)"),
        (
            {"layers.1.mlp.up_proj.weight": torch.zeros(3, 2)},
            {},
            "it has a tensor 'layers.1.mlp.up_proj.weight' of shape (3, 2) and the seed has none",
        ),
    ],
)
def test_another_architecture_is_named_before_anything_is_loaded(tmp_path, changes, config, message):
    # The seed's own values are broken too, which would be found on reading them.
    seed = write_model(tmp_path / "seed", {DOWN: torch.full((2, 3), torch.nan)})
    experts = {
        "good": write_model(tmp_path / "good"),
        "math": write_model(tmp_path / "math", changes, **config),
    }
    with pytest.raises(UserError) as raised:
        read_task_vectors(seed, experts, "mlp")
    wanted = f"expert 'math': {message}; experts must share the seed's architecture"
    assert str(raised.value).startswith(wanted)


def test_weights_that_give_no_task_vector(tmp_path):
    seed = write_model(tmp_path / "seed")
    broken = write_model(tmp_path / "broken", {UP: torch.full((3, 2), torch.inf)})
    with pytest.raises(UserError, match=f"expert 'x': its '{UP}' holds values that are not finite"):
        read_task_vectors(seed, {"x": broken}, "mlp")
    packed = write_model(tmp_path / "packed", {UP: torch.zeros(3, 2, dtype=torch.int8)})
    with pytest.raises(UserError, match=f"expert 'x': its '{UP}' is stored as I8"):
        read_task_vectors(seed, {"x": packed}, "mlp")
    with pytest.raises(UserError, match="no expert"):
        read_task_vectors(seed, {}, "mlp")


def test_folders_that_are_incomplete_or_damaged(tmp_path):
    seed = write_model(tmp_path / "seed")
    broken = shard(write_model(tmp_path / "broken"))

    def reason() -> str:
        with pytest.raises(UserError) as raised:
            read_task_vectors(seed, {"x": broken}, "mlp")
        assert str(raised.value).startswith("expert 'x': ")
        return str(raised.value)

    (broken / "model-2.safetensors").write_bytes(b"torn")
    assert "model-2.safetensors' is damaged" in reason()
    (broken / "model-2.safetensors").unlink()
    assert "has no file 'model-2.safetensors'" in reason()
    (broken / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json' is damaged" in reason()
    (broken / "config.json").write_text("[]")
    assert "config.json' is no JSON object" in reason()
    shutil.rmtree(broken)
    assert "has no config.json" in reason()


# --- methods ---


def test_a_method_merges_every_tensor():
    seed = {"a": torch.zeros(2), "b": torch.zeros(1, 2)}
    vectors = vectors_of(
        seed,
        one={"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[10.0, 0.0]])},
        two={"a": torch.tensor([3.0, -2.0]), "b": torch.tensor([[0.0, 20.0]])},
    )
    merged = merge_by_method(method("task_arithmetic"), vectors, {"scale": 0.5})
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {"a": [2.0, 0.0], "b": [[5.0, 10.0]]}


def test_a_method_that_needs_it_gets_the_tensors_own_seed():
    seed = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
    vectors = vectors_of(seed, one={name: torch.randn(4, 4) for name in seed})
    merged = merge_by_method(method("nearswap"), vectors, {})
    for name in seed:
        assert torch.equal(merged[name], method("nearswap").merge(vectors.stacked(name), seed[name]))


def test_masks_differ_between_tensors_and_follow_the_seed():
    ones = {"a": torch.ones(64), "b": torch.ones(64)}
    vectors = vectors_of({name: torch.zeros(64) for name in ones}, one=ones)

    def dropped(**parameters: float) -> dict[str, list[float]]:
        return {k: v.tolist() for k, v in merge_by_method(method("dare_linear"), vectors, parameters).items()}

    first = dropped(seed=1)
    assert first["a"] != first["b"]
    assert first == dropped(seed=1)
    assert first["a"] != dropped(seed=2)["a"]
    assert dropped() == dropped(seed=0)


def test_parameters_are_checked():
    vectors = vectors_of({"a": torch.zeros(2)}, one={"a": torch.ones(2)})
    with pytest.raises(UserError, match="unknown parameter of method 'ties': 'densiti'"):
        merge_by_method(method("ties"), vectors, {"densiti": 0.2})
    with pytest.raises(UserError, match="'seed'"):
        merge_by_method(method("ties"), vectors, {"seed": 1})


# --- applying ---


def test_merged_inside_and_the_seed_afterwards():
    seed = {"a": torch.tensor([1.0, 2.0])}
    model, vectors = Tiny(seed["a"]), vectors_of(seed, one={"a": torch.ones(2)})
    with applied(model, vectors, {"a": torch.tensor([0.5, -2.0])}) as merged:
        assert merged is model
        assert model.a.tolist() == [1.5, 0.0]
        assert model.b.tolist() == [1.0, 1.0]
    assert model.a.tolist() == [1.0, 2.0]
    with applied(model, vectors, {"a": torch.tensor([0.5, -2.0])}, factor=3.0):
        assert model.a.tolist() == [2.5, -4.0]


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=20, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_the_seed_comes_back_bit_for_bit(values, delta, stored_as, resident_as, raises):
    stored = torch.tensor(values).to(stored_as)
    model = Tiny(stored, resident_as)
    before = model.a.detach().clone()
    vectors = vectors_of({"a": stored.float()}, one={"a": torch.zeros(len(values))})
    merged = torch.tensor(delta[: len(values)])
    try:
        with applied(model, vectors, {"a": merged}):
            assert torch.equal(model.a, (stored.float() + merged).to(resident_as))
            if raises:
                raise RuntimeError("inside")
    except RuntimeError:
        assert raises
    bits = torch.int32 if resident_as == torch.float32 else torch.int16
    assert torch.equal(model.a.detach().view(bits), before.view(bits))


@pytest.mark.parametrize(("name", "size"), [("unknown", 2), ("b", 2), ("z", 2), ("y", 1), ("y", 4)])
def test_nothing_is_written_if_something_does_not_fit(name, size):
    seed = {each: torch.zeros(2) for each in "ayz"}  # the model has no z, and b was not selected
    model, vectors = Tiny(seed["a"]), vectors_of(seed, one=seed)
    model.y = nn.Parameter(torch.zeros(2))
    merged = {"a": torch.ones(2), name: torch.ones(size)}
    with pytest.raises(ValueError, match=f"'{name}'"), applied(model, vectors, merged):
        pytest.fail("entered")
    assert model.a.tolist() == [0.0, 0.0]


def test_a_resident_model_of_the_zoo_is_merged_and_restored():
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], {"add": zoo["experts"]["add"]}, "mlp")
    model, add = load_model(zoo["seed"]), load_model(zoo["experts"]["add"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(8)[None]
    with applied(model, vectors, {name: vectors.stacked(name)[0] for name in vectors.seed}), torch.no_grad():
        # Seed plus the whole task vector is the expert, whose attention is the seed's.
        assert torch.allclose(model(tokens).logits, add(tokens).logits, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tensor_is_finite_if_what_it_is_rounded_to_is(dtype: torch.dtype, sign: float) -> None:
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float32)
    near = [largest]
    for direction in (torch.inf, 0.0):
        value = largest
        for _ in range(3):
            value = torch.nextafter(value, torch.tensor(direction))
            near.append(value)
    step = largest.item() * torch.finfo(dtype).eps / 4
    near += [torch.tensor(largest.item() + step * factor) for factor in (0.99, 1.0, 1.01, 2.0)]
    for value in (*near, torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(0.0)):
        tensor = torch.stack([torch.tensor(1.0), sign * value, torch.tensor(-2.0)])
        expected = bool(tensor.to(dtype).float().isfinite().all())
        assert is_finite(tensor, dtype) == expected, value
    assert is_finite(torch.empty(0), dtype)
