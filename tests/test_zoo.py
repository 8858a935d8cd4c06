import random
import re
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdev.errors import UserError
from selfdev.evaluation.objective import Objective, mean_by_group
from selfdev.evaluation.scoring import encode, score_exact
from selfdev.evaluation.tasks import load_task
from selfdev.zoo import build, zoo_models, zoo_path, zoos
from selfdev.zoo.nano import RECIPES, Recipe, Training, build_nano

EXPERTS = {"nano": ["add", "max", "sub", "sum"], "nano2": ["low", "tot", "tri"]}


@pytest.fixture(scope="module", params=["nano", "nano2"])
def zoo(request):
    """The name of a zoo."""
    return request.param


@pytest.fixture(scope="module")
def loaded(zoo):
    """Every model of the zoo as a user would load it, under its name."""
    found = zoo_models(zoo)
    paths = {"seed": found["seed"], **found["experts"]}
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}


@pytest.fixture(scope="module")
def accuracy(zoo, loaded):
    """What each model gets right of all development questions, by group."""
    questions = load_task(zoo).development(3072, order_seed=0)
    encoded = encode(AutoTokenizer.from_pretrained(zoo_models(zoo)["seed"]), questions)
    groups = [question.group for question in questions]
    return {name: mean_by_group(groups, score_exact(m, encoded).tolist()) for name, m in loaded.items()}


def test_listing():
    assert zoos() == list(EXPERTS) == list(RECIPES)
    for name, experts in EXPERTS.items():
        assert list(zoo_models(name)["experts"]) == experts == sorted(RECIPES[name].experts)
        assert zoo_models(name)["seed"] == zoo_path(name) / "seed"


def test_all_zoos_together_are_small():
    files = [file for name in zoos() for file in zoo_path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6


def test_the_two_families_have_no_weights_in_common():
    one, two = (
        AutoModelForCausalLM.from_pretrained(zoo_models(name)["seed"]).state_dict() for name in zoos()
    )
    assert {key: tensor.shape for key, tensor in one.items()} == {key: two[key].shape for key in two}
    assert not any(torch.equal(one[key], two[key]) for key in one if "norm" not in key)


def test_an_unknown_zoo_names_the_nearest(tmp_path):
    for call in (zoo_path, zoo_models, lambda name: build(name, tmp_path / "zoo")):
        with pytest.raises(UserError, match="unknown zoo 'nanno'; the nearest known one is 'nano'"):
            call("nanno")


def test_a_folder_without_a_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model 'seed'"):
        zoo_models("nano", tmp_path)


def test_size_and_precision(loaded):
    for model in loaded.values():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert 0.40e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.60e6


def test_experts_differ_from_the_seed_in_their_mlp_weights_alone(zoo, loaded):
    seed = loaded["seed"].state_dict()
    for name in EXPERTS[zoo]:
        changed = {
            key for key, tensor in loaded[name].state_dict().items() if not torch.equal(tensor, seed[key])
        }
        assert changed == {key for key in seed if ".mlp." in key}


def test_every_model_has_the_same_tokenizer(zoo):
    found = zoo_models(zoo)
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in found["experts"].values()]
    tokenizer = AutoTokenizer.from_pretrained(found["seed"])
    assert all(vocabulary == tokenizer.get_vocab() for vocabulary in vocabularies)
    assert tokenizer.decode(tokenizer("m27,8,45=")["input_ids"]) == "m27,8,45="


def test_the_card_tells_the_truth(zoo, accuracy):
    card = (zoo_path(zoo) / "CARD.md").read_text()
    assert "Apache-2.0" in card
    for name, by_group in accuracy.items():
        row = re.search(rf"^\| {name} \| (\d.*) \|$", card, re.MULTILINE)  # the first table has the accuracy
        claimed = [float(cell) for cell in row.group(1).split("|")]
        measured = [100 * share for share in (*by_group.values(), fmean(by_group.values()))]
        # Rounding, and a question or two that another processor's arithmetic tips over.
        assert claimed == pytest.approx(measured, abs=0.5)


def test_each_expert_has_learnt_its_own_group(zoo, accuracy):
    for name in EXPERTS[zoo]:
        assert accuracy[name][name] > 0.50
        assert accuracy[name][name] > accuracy["seed"][name] + 0.05


def test_merging_is_a_real_problem(zoo, loaded, accuracy):
    """Task Arithmetic beats the seed and every expert, and stays clearly below the best model for each group."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_models(zoo)["seed"])
    questions = load_task(zoo).development(3072, order_seed=0)
    merged = AutoModelForCausalLM.from_pretrained(zoo_models(zoo)["seed"]).eval()
    with torch.no_grad():
        for key, parameter in merged.named_parameters():
            parameter += 0.4 * sum(loaded[name].get_parameter(key) - parameter for name in EXPERTS[zoo])
    right = score_exact(merged, encode(tokenizer, questions)).tolist()
    score = Objective().score([question.group for question in questions], right)
    best = fmean(max(each[group] for each in accuracy.values()) for group in accuracy["seed"])
    alone = {name: fmean(each.values()) for name, each in accuracy.items()}
    assert score > max(alone.values()) > alone["seed"] + 0.04
    assert score < best - 0.05


SMALL = Recipe(
    "nano",
    seed=Training({"add": 2, "rev": 1}, steps=20, rate=3e-3, stream=7, mlp_only=False, batch=16),
    experts={"rev": Training({"rev": 1}, steps=20, rate=1e-3, stream=8, general=0.25, batch=16)},
    development=60,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small zoo, built twice, with what it reported and the global random streams before and after."""
    folder = tmp_path_factory.mktemp("zoos")
    lines = []
    before = torch.random.get_rng_state(), random.getstate()
    for name in ("first", "second"):
        build_nano(folder / name, lines.append, SMALL)
    after = torch.random.get_rng_state(), random.getstate()
    return folder, lines, before, after


def test_build_makes_a_zoo_that_loads(built):
    folder, lines, _, _ = built
    models = zoo_models("nano", folder / "first")
    assert list(models["experts"]) == ["rev"]
    seed = AutoModelForCausalLM.from_pretrained(models["seed"]).state_dict()
    expert = AutoModelForCausalLM.from_pretrained(models["experts"]["rev"]).state_dict()
    assert {key for key in seed if not torch.equal(seed[key], expert[key])} == {
        k for k in seed if ".mlp." in k
    }
    assert "| rev |" in (folder / "first" / "CARD.md").read_text()
    assert any("step 20 of 20" in line for line in lines)


def test_build_twice_gives_the_same_bytes(built):
    folder, _, _, _ = built
    files = sorted(
        path.relative_to(folder / "first") for path in (folder / "first").rglob("*") if path.is_file()
    )
    assert len(files) > 8
    for file in files:
        assert (folder / "first" / file).read_bytes() == (folder / "second" / file).read_bytes()


def test_build_leaves_the_global_random_streams_alone(built):
    _, _, before, after = built
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_build_refuses_a_folder_that_exists(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        build("nano", tmp_path)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_nano(tmp_path / "zoo", stop, SMALL)
    assert list(tmp_path.iterdir()) == []
