"""mergekit's YAML files: the same output as its own command gives, and messages for what is not taken."""

import hashlib
import shutil
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from checkpoints import TENSORS, UP, nano_seed, read, relative, write
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.merging.mergekit_config import read_config
from selfdev.merging.mergekit_settings import read_yaml

MLP = "model.layers.{}.mlp.up_proj.weight"
ATTENTION = "model.layers.{}.self_attn.q_proj.weight"

CONFIGS = {
    "linear": """
        merge_method: linear
        models:
          - {model: ONE, parameters: {weight: 0.2}}
          - {model: TWO, parameters: {weight: [0.1, 0.9]}}
        """,
    "linear, a sum that counts the base": """
        merge_method: linear
        base_model: SEED
        models:
          - model: ONE
            parameters: {weight: 0.3}
          - model: TWO
        parameters: {weight: 0.5, normalize: false}
        """,
    "task_arithmetic with gradients and filters": """
        merge_method: task_arithmetic
        base_model: SEED
        models:
          - model: ONE
            parameters:
              weight:
                - filter: mlp
                  value: [0, 0.4, 1]
                - filter: self_attn
                  value: 0.7
          - model: TWO
            parameters: {weight: [1.0, 0.2]}
        parameters: {weight: 0.25, lambda: 1.1, normalize: true}
        """,
    "ties": """
        merge_method: ties
        base_model: SEED
        models:
          - model: SEED
          - model: ONE
            parameters: {density: [0.2, 0.9], weight: 0.5}
          - model: TWO
            parameters: {density: 0.4, weight: {filter: "*", value: [0.3, 0.8]}}
        parameters: {int8_mask: true, lambda: 0.9}
        """,
    "ties, not normalised": """
        merge_method: ties
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {density: 0.3, weight: 0.6, normalize: false, rescale: true}
        """,
    "dare_ties at density 1": """
        merge_method: dare_ties
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: [0.2, 0.6], density: 1.0, normalize: true}
        """,
    "dare_linear at density 1": """
        merge_method: dare_linear
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: 0.6, lambda: 0.5}
        """,
    "breadcrumbs_ties": """
        merge_method: breadcrumbs_ties
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: 0.6, density: [0.5, 0.9], gamma: 0.02}
        """,
    "breadcrumbs": """
        merge_method: breadcrumbs
        base_model: SEED
        models:
          - {model: ONE, parameters: {weight: 0.3, density: 0.8}}
          - {model: TWO, parameters: {weight: [0.2, 0.6], density: 0.5, gamma: 0.1}}
        """,
    "della at density 1": """
        merge_method: della
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: [0.2, 0.6], density: 1.0, epsilon: 0.0}
        """,
    "della_linear at density 1": """
        merge_method: della_linear
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: 0.6, density: 1.0, epsilon: 0.0, lambda: 1.2}
        """,
    "slerp by slices": """
        slices:
          - sources:
              - {model: ONE, layer_range: [0, 3]}
              - {model: TWO, layer_range: [0, 3]}
        merge_method: slerp
        base_model: TWO
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 1]
            - filter: mlp
              value: [1, 0.5, 0]
            - value: 0.5
        """,
    "slices with parameters of their own": """
        slices:
          - sources:
              - {model: ONE, layer_range: [0, 1], parameters: {weight: 1.0}}
              - {model: TWO, layer_range: [0, 1], parameters: {weight: 0.1}}
          - sources:
              - {model: ONE, layer_range: [1, 3]}
              - {model: TWO, layer_range: [1, 3], parameters: {weight: [0.1, 0.9]}}
            parameters: {weight: 0.3}
        merge_method: linear
        """,
    "slices beside a base model, which is no source of theirs": """
        slices:
          - sources:
              - {model: ONE, layer_range: [0, 3]}
              - {model: TWO, layer_range: [0, 3], parameters: {weight: 0.2}}
        merge_method: linear
        base_model: SEED
        parameters: {weight: 1.0}
        """,
    "nuslerp": """
        merge_method: nuslerp
        base_model: SEED
        models:
          - {model: ONE, parameters: {weight: [0.2, 0.8]}}
          - {model: TWO, parameters: {weight: 0.4}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        """,
    "nuslerp without a base": """
        merge_method: nuslerp
        models:
          - {model: ONE, parameters: {weight: 0.2}}
          - {model: TWO, parameters: {weight: 0.4}}
        """,
    "multislerp": """
        merge_method: multislerp
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {weight: 0.7, normalize_weights: false}
        """,
    "multislerp without a base": """
        merge_method: multislerp
        models:
          - {model: ONE, parameters: {weight: 0.2}}
          - {model: TWO, parameters: {weight: 0.4}}
          - {model: SEED, parameters: {weight: 0.1}}
        """,
    "model_stock": """
        merge_method: model_stock
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {filter_wise: true}
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: SEED}, {model: ONE}, {model: TWO}]
        """,
    "karcher, two steps": """
        merge_method: karcher
        models: [{model: SEED}, {model: ONE}, {model: TWO}]
        parameters: {max_iter: 2, tol: 1e-8}
        """,
    "sce": """
        merge_method: sce
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {select_topk: [0.1, 0.9]}
        """,
    "nearswap": """
        merge_method: nearswap
        base_model: SEED
        models: [{model: ONE}]
        parameters: {t: [1e-3, 0.05]}
        """,
    "arcee_fusion": """
        merge_method: arcee_fusion
        base_model: SEED
        models: [{model: ONE}]
        """,
    "ram": """
        merge_method: ram
        base_model: SEED
        models: [{model: ONE}, {model: TWO}]
        parameters: {epsilon: 0.01}
        """,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small transformer of three layers and two relatives, all in float32, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    seed = folder / "seed"
    shutil.copytree(nano_seed(), seed, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=len(AutoTokenizer.from_pretrained(seed)))
    LlamaForCausalLM(config).save_pretrained(seed)
    return {"SEED": seed, "ONE": relative(seed, folder / "one", 1), "TWO": relative(seed, folder / "two", 2)}


def written(folder: Path, text: str, models: dict[str, Path]) -> Path:
    """The configuration as a file, with the models' folders in the place of their names."""
    text = dedent(text)
    for name, path in models.items():
        text = text.replace(name, str(path))
    file = folder / "merge.yml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_gives_what_mergekits_own_command_gives(text: str, models: dict[str, Path], tmp_path: Path) -> None:
    run_yaml = pytest.importorskip(
        "mergekit.scripts.run_yaml", reason="mergekit is not installed; `pip install -e '.[dev]'` brings it"
    )
    file = written(tmp_path, dedent(text) + "dtype: float32\n", models)
    arguments = [str(file), str(tmp_path / "theirs"), "--quiet"]
    run_yaml.main(arguments, standalone_mode=False)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "ours")]) == 0
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5, name
    seed = read(models["SEED"])
    assert any(not torch.equal(tensor, seed[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("text", [CONFIGS["slerp by slices"], CONFIGS["nuslerp without a base"]])
def test_zero_tensors_are_at_a_right_angle_as_in_mergekit(
    text: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Biases are often zero in one of two models."""
    run_yaml = pytest.importorskip("mergekit.scripts.run_yaml")
    zero = tmp_path / "zero"
    shutil.copytree(models["ONE"], zero)
    tensors = read(zero)
    tensors[MLP.format(1)] = torch.zeros_like(tensors[MLP.format(1)])
    save_file(tensors, zero / "model.safetensors", {"format": "pt"})
    file = written(tmp_path, dedent(text) + "dtype: float32\n", models | {"ONE": zero})
    run_yaml.main([str(file), str(tmp_path / "theirs"), "--quiet"], standalone_mode=False)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "ours")]) == 0
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5, name


MIXTURE = """
    merge_method: METHOD
    base_model: SEED
    models: [{model: ONE}]
    parameters: {weight: WEIGHT}
    """


@pytest.mark.parametrize(
    ("name", "weight"), [("ties", "0.5"), ("task_arithmetic", "[{filter: mlp, value: 1}, {value: 0.5}]")]
)
def test_refuses_what_mergekit_does_to_a_pack_of_experts(
    name: str, weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = "model.layers.0.mlp.experts.1.up_proj.weight"
    models = {
        "SEED": write(tmp_path / "seed", {expert: TENSORS[UP]}),
        "ONE": write(tmp_path / "one", {expert: TENSORS[UP] + 1}),
    }
    text = MIXTURE.replace("METHOD", name).replace("WEIGHT", weight)
    file = written(tmp_path, text, models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    assert f"'{expert}' is one expert of a mixture" in capsys.readouterr().err
    text = MIXTURE.replace("METHOD", "task_arithmetic").replace("WEIGHT", "0.5")
    file = written(tmp_path, text, models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(read(tmp_path / "out")[expert], TENSORS[UP] + 0.5)


def test_says_where_a_filter_fits_nothing(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = CONFIGS["slerp by slices"].replace("filter: mlp", "filter: mpl")
    assert (
        main(["merge", "--config", str(written(tmp_path, text, models)), "--out", str(tmp_path / "o")]) == 0
    )
    assert "no tensor's name contains the filter 'mpl'" in caplog.text


@pytest.mark.parametrize("weight", ["[0.2, 0.9]", "0.5"])
def test_slices_of_a_model_with_positions(weight: str, tmp_path: Path) -> None:
    """GPT-2's embeddings of positions belong to the first slice, as those of tokens do."""
    run_yaml = pytest.importorskip("mergekit.scripts.run_yaml")
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 16, "n_inner": 40}
    config = GPT2Config(**shape, vocab_size=len(AutoTokenizer.from_pretrained(nano_seed())))
    shutil.copytree(
        nano_seed(), tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "one")
    models = {"ONE": tmp_path / "one", "TWO": relative(tmp_path / "one", tmp_path / "two", 1)}
    text = f"""
        slices:
          - sources:
              - {{model: ONE, layer_range: [0, 2]}}
              - {{model: TWO, layer_range: [0, 2]}}
            parameters: {{weight: 1}}
          - sources:
              - {{model: ONE, layer_range: [2, 3], parameters: {{weight: {weight}}}}}
              - {{model: TWO, layer_range: [2, 3]}}
            parameters: {{weight: 0.1}}
        merge_method: linear
        dtype: float32
        """
    file = written(tmp_path, text, models)
    run_yaml.main([str(file), str(tmp_path / "theirs"), "--quiet"], standalone_mode=False)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "ours")]) == 0
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5, name


def test_gradients_are_about_the_layers_of_the_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        "model.layers.2.mlp.up_proj.weight": TENSORS[UP],  # predicts the token after the next
        "vision_tower.layers.0.mlp.up_proj.weight": TENSORS[UP],
    }
    for each in extra:
        folder = tmp_path / each
        models = {
            "SEED": write(folder / "seed", {each: extra[each]}),
            "ONE": write(folder / "one", {each: extra[each] + 1}),
        }
        text = (
            "merge_method: task_arithmetic\nbase_model: SEED\nmodels: [{model: ONE}]\nparameters: {weight: "
        )
        assert (
            main(
                [
                    "merge",
                    "--config",
                    str(written(folder, text + "0.5}\n", models)),
                    "--out",
                    str(folder / "a"),
                ]
            )
            == 0
        )
        torch.testing.assert_close(read(folder / "a")[each], extra[each] + 0.5)
        file = written(folder, text + "[0, 1]}\n", models)
        assert main(["merge", "--config", str(file), "--out", str(folder / "b")]) == 2
        assert f"over the 2 layers 'model.layers', and '{each}' is in none" in capsys.readouterr().err


def test_gradients_and_filters_by_hand(models: dict[str, Path], tmp_path: Path) -> None:
    file = written(tmp_path, CONFIGS["task_arithmetic with gradients and filters"], models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    out, seed, one, two = (read(folder) for folder in (tmp_path / "out", *models.values()))
    # The middle one of three layers: in the MLP 0.4 and half way from 1 to 0.2, in attention 0.7; sums divide.
    for name, first in ((MLP.format(1), 0.4), (ATTENTION.format(1), 0.7)):
        second = 0.6
        expected = (first * (one[name] - seed[name]) + second * (two[name] - seed[name])) / (first + second)
        torch.testing.assert_close(out[name] - seed[name], 1.1 * expected, atol=2e-6, rtol=1e-5)
    # The last norm has no depth and no filter: the merge's own weight, and the gradient's first value.
    name = "model.norm.weight"
    expected = (0.25 * (one[name] - seed[name]) + 1.0 * (two[name] - seed[name])) / 1.25
    torch.testing.assert_close(out[name] - seed[name], 1.1 * expected, atol=2e-6, rtol=1e-5)


def test_dare_thins_by_the_density_of_the_layer(models: dict[str, Path], tmp_path: Path) -> None:
    text = """
        merge_method: dare_linear
        base_model: SEED
        models: [{model: ONE}]
        parameters: {weight: 1.0, density: [1.0, 0.5, 0.1]}
        """
    file = written(tmp_path, text, models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    out, seed = read(tmp_path / "out"), read(models["SEED"])
    for layer, density in enumerate((1.0, 0.5, 0.1)):
        name = MLP.format(layer)
        kept = (out[name] != seed[name]).float().mean().item()
        assert kept == pytest.approx(density, abs=0.03)


def test_the_type_and_the_tokenizer_are_those_asked_for(models: dict[str, Path], tmp_path: Path) -> None:
    donor = tmp_path / "donor"
    shutil.copytree(models["ONE"], donor)
    (donor / "chat_template.jinja").write_text("{{ messages }}")
    text = """
        merge_method: linear
        models: [{model: ONE, parameters: {weight: 1}}, {model: TWO, parameters: {weight: 3}}]
        dtype: float32
        out_dtype: bfloat16
        tokenizer_source: DONOR
        """
    file = written(tmp_path, text, models | {"DONOR": donor})
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    digest = hashlib.sha256((donor / "chat_template.jinja").read_bytes()).hexdigest()
    card = (tmp_path / "out/README.md").read_text()
    assert f"| tokenizer | `{donor}` | chat_template.jinja | `{digest}` |" in card
    assert "2 experts merged" in card
    out, one, two = (read(folder) for folder in (tmp_path / "out", models["ONE"], models["TWO"]))
    name = MLP.format(0)
    expected = (one[name].double() + 3 * two[name].double()) / 4
    assert out[name].dtype == torch.bfloat16
    torch.testing.assert_close(out[name].double(), expected, atol=0, rtol=2**-8)


def test_the_card_holds_the_file_and_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    file = written(tmp_path, CONFIGS["linear"], models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"selfdev merge --config {file} --out DIR" in card
    assert file.read_text().strip() in card


def test_adapters_and_revisions_are_written_in_our_words(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(
        "merge_method: ties\nbase_model: org/base@v1\nparameters: {weight: 1}\n"
        "models: [{model: org/base@v1+org/lora}, {model: a/x}, {model: b/x}]\n"
    )
    recipe = read_config(file)
    assert recipe.seed == "org/base@v1"
    assert recipe.experts == {"lora": "org/lora+org/base@v1", "x": "a/x", "x-2": "b/x"}


def test_the_seed_is_a_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a/x+b/lora}, {model: c/y}]\n"
    )
    recipe = read_config(file)
    assert (recipe.seed, recipe.experts) == ("c/y", {"lora": "b/lora+a/x", "y": "c/y"})
    file.write_text("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a/x+b/lora}]\n")
    with pytest.raises(
        UserError, match="names adapters alone, and one whole model is needed; `selfdev merge"
    ):
        read_config(file)
    file.write_text("merge_method: ties\nbase_model: a/x+b/lora\nmodels: [{model: c/y}]\n")
    with pytest.raises(UserError, match="line 2: 'base_model' is an adapter on its base"):
        read_config(file)


def test_tensors_that_the_base_lacks_are_left_out_and_named(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As mergekit leaves them out: the value head of a reward model, for one."""
    more = Path(shutil.copytree(models["ONE"], tmp_path / "more"))
    save_file(read(more) | {"v_head.summary.weight": torch.ones(1, 2)}, more / "model.safetensors")
    found = {}
    for name, one in (("plain", models["ONE"]), ("more", more)):
        text = f"merge_method: linear\nmodels: [{{model: {models['TWO']}}}, {{model: {one}}}]\nparameters: {{weight: 1}}\n"
        (tmp_path / "merge.yml").write_text(text)
        out = tmp_path / f"merged {name}"
        assert main(["merge", "--config", str(tmp_path / "merge.yml"), "--out", str(out)]) == 0
        found[name] = read(out)
    assert found["more"].keys() == found["plain"].keys()
    assert all(torch.equal(tensor, found["plain"][name]) for name, tensor in found["more"].items())
    # The first model plays the seed, which is no slip and not said.
    assert caplog.messages == [
        "expert 'more': 'v_head.summary.weight' is left out, since the seed has none such (1 in all)"
    ]


GOOD = {
    "merge_method": "merge_method: ties",
    "base_model": "base_model: SEED",
    "models": "models: [{model: ONE}, {model: TWO}]",
    "parameters": "parameters: {weight: 1, density: 0.5}",
}
MISTAKES = [
    ({"merge_method": ""}, "has no merge_method"),
    (
        {"merge_method": "merge_method: tise"},
        "line 1: 'merge_method' is not taken: unknown method: 'tise'; the nearest",
    ),
    (
        {"merge_method": "merge_method: passthrough"},
        "line 1: 'merge_method' is not taken: layers that change",
    ),
    ({"base_model": ""}, "names no base_model"),
    ({"base_model": "base_model: [SEED]"}, "line 2: 'base_model' is no text"),
    ({"models": ""}, "needs models or slices"),
    ({"models": "models: ONE"}, "line 3: 'models' is no list"),
    ({"models": "models: [{model: ONE}, {model: ONE}]"}, "line 3: 'model' names"),
    ({"models": "models: [{parameters: {weight: 1}}]"}, "line 3: 'model' is missing"),
    ({"models": "models:\n  - {model: ONE}\n  - {}"}, "line 5: 'model' is missing"),
    ({"models": "slices: [{parameters: {weight: 1}}]"}, "line 3: 'sources' is missing"),
    ({"models": "slices: [{sources: [{parameters: {}}]}]"}, "line 3: 'layer_range' is no pair of numbers"),
    ({"models": "models: [{model: ONE, layers: 1}]"}, "line 3: 'layers' is no key of a model"),
    ({"models": "modules: {text: {models: []}}"}, "line 3: 'modules' merges parts of a model by themselves"),
    ({"models": "slices: [{sources: [{model: ONE}]}]"}, "line 3: 'layer_range' is no pair"),
    (
        {
            "models": "slices:\n  - sources:\n      - {model: ONE, layer_range: [0, 3]}\n"
            "      - {model: TWO, layer_range: [1, 4]}"
        },
        "line 6: 'layer_range' differs from that of the first source",
    ),
    ({"models": "slices: [{sources: [{model: ONE, layer_range: [0, 2]}]}]"}, "do not hold the 3 layers"),
    (
        {
            "models": "slices: [{sources: [{model: ONE, layer_range: [0, 2]}]}, "
            "{sources: [{model: TWO, layer_range: [2, 3]}]}]"
        },
        "line 3: 'slices' take layers from different models",
    ),
    ({"parameters": "parameters: {weight: 1, density: 0}"}, "density 0.0: it is the share of entries kept"),
    ({"parameters": "parameters: {weight: {filter: mlp, value: 1}}"}, "no 'weight' is given for tensor"),
    (
        {"parameters": "parameters: {wieght: 1}"},
        "line 4: 'wieght' is not taken: unknown parameter: 'wieght'; the near",
    ),
    ({"parameters": "parameters: {weight: much}"}, "line 4: 'weight' is 'much', which is no number"),
    ({"parameters": "parameters: {weight: []}"}, "line 4: 'weight' is an empty list"),
    ({"parameters": "parameters: {weight: [{filter: mlp}]}"}, "line 4: 'weight' has a case without a value"),
    (
        {"parameters": "parameters: {weight: 1, normalize: 1}"},
        "line 4: 'normalize' is 1; write true or false",
    ),
    ({"parameters": "parameters: {weight: 1, weight: 2}"}, "line 4: 'weight' is given twice"),
    ({"parameters": "parameters: {weight: 1}\ndtype: int8"}, "line 5: 'dtype' is int8"),
    (
        {"parameters": "parameters: {weight: 1}\ndtype: int8\nout_dtype: float16"},
        "line 5: 'dtype' is int8",
    ),
    ({"parameters": "parameters: {weight: 1}\nchat_template: auto"}, "line 5: 'chat_template' is not taken"),
    (
        {"parameters": "parameters: {weight: 1}\ntokenizer: {source: base, pad_to_multiple_of: 8}"},
        "line 5: 'pad_to_multiple_of' changes rows of the embeddings",
    ),
    ({"parameters": "parameters: {"}, "is no YAML"),
    ({"parameters": "parameters: " + 5000 * "["}, "is no YAML"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_is_not_taken_is_named_with_its_line(
    changes: dict[str, str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\n".join(line for line in {**GOOD, **changes}.values() if line)
    file = written(tmp_path, text, models)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_other_tokens_is_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = tmp_path / "donor"
    shutil.copytree(models["ONE"], donor)
    tokenizer = (donor / "tokenizer.json").read_text()
    (donor / "tokenizer.json").write_text(tokenizer.replace('"+"', '"plus"'))
    assert (donor / "tokenizer.json").read_text() != tokenizer
    for source, owner in ((str(donor), "the tokenizer of"), ("union", "expert 'donor'")):
        text = (
            f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: ONE}}, {{model: {donor}}}]\n"
        )
        file = written(tmp_path, text + f"tokenizer_source: {source}\n", models)
        out = ["--out", str(tmp_path / "out"), "--embeddings", "seed"]
        assert main(["merge", "--config", str(file), *out]) == 2
        error = capsys.readouterr().err
        assert owner in error
        assert "another token than the seed" in error


def test_anchors_are_inherited_and_what_is_no_date_is_no_yaml(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("a: &all {weight: 1.0, density: 0.5}\nb:\n  <<: *all\n  weight: 0.3\n")
    assert read_yaml(file)["b"] == {"weight": 0.3, "density": 0.5}
    file.write_text("merged: 2024-13-45\n")
    with pytest.raises(UserError, match="is no YAML"):
        read_yaml(file)


def test_nothing_else_goes_beside_a_config(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, CONFIGS["linear"], models)
    assert main(["merge", "--config", str(file), "--method", "ties", "--out", str(tmp_path / "out")]) == 2
    assert "beside --config only --out and --embeddings go" in capsys.readouterr().err
    assert main(["merge", "--method", "ties", "--out", str(tmp_path / "out")]) == 2
    assert "name --method, --seed and at least one --expert" in capsys.readouterr().err
