"""The records of the methods: search ranges, grids, and what a wrong name or number is told."""

import inspect
import random

import pytest
import torch

from selfdev.algorithms.library import Parameter, method, methods
from selfdev.errors import UserError

METHODS = methods()
QUICKSTART = {
    "task_arithmetic",
    "weighted_task_arithmetic",
    "ties",
    "dare_ties",
    "model_stock",
    "tsv_m",
    "iso_c",
}


def test_the_rivals_of_quickstart_are_there():
    assert set(METHODS) >= QUICKSTART


@pytest.mark.parametrize("name", list(methods()))
def test_the_record_agrees_with_the_function(name):
    entry = METHODS[name]
    keywords = {
        parameter.name: parameter.default
        for parameter in inspect.signature(entry.function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert entry.name == entry.function.__name__ == name
    assert {parameter.name: parameter.default for parameter in entry.parameters} == keywords
    searched = [parameter for parameter in entry.parameters if parameter.searched]
    assert searched, "tuning has nothing to search"
    assert all(parameter.low < parameter.high for parameter in searched)
    for parameter in entry.parameters:
        assert f"\n        {parameter.name}: " in (entry.function.__doc__ or ""), "not documented"
    assert str(entry.paper.year) in (entry.function.__doc__ or "")


@pytest.mark.parametrize("name", list(methods()))
def test_samples_lie_in_the_range(name):
    entry = METHODS[name]
    rng = random.Random(0)
    for _ in range(50):
        setting = entry.sample(rng, experts=3)
        searched = [parameter for parameter in entry.parameters if parameter.searched]
        assert list(setting) == [parameter.name for parameter in searched]
        for parameter in searched:
            values = setting[parameter.name] if parameter.per_expert else [setting[parameter.name]]
            assert len(values) == (3 if parameter.per_expert else 1)
            assert all(parameter.low <= value <= parameter.high for value in values)
            assert not parameter.integer or all(isinstance(value, int) for value in values)


@pytest.mark.parametrize("name", list(methods()))
def test_the_grid_is_small_and_works(name):
    entry = METHODS[name]
    stack = torch.randn(entry.experts or 3, 12, 20, generator=torch.Generator().manual_seed(0))
    settings = entry.grid(len(stack))
    assert 1 <= len(settings) <= 12
    assert settings[0] == entry.defaults(len(stack))
    outputs = [entry.merge(stack, torch.ones(12, 20), **setting) for setting in settings]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) >= min(4, len(settings))


def test_the_grid_takes_round_densities():
    densities = [setting["density"] for setting in method("ties").grid(4)]
    assert densities == [0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def test_the_grid_leaves_factors_and_seeds_alone():
    assert method("task_arithmetic").grid(4) == [{"scale": 0.3}]
    assert {setting["seed"] for setting in method("dare_ties").grid(4)} == {0}


def test_sampling_is_reproducible():
    draws = [method("della").sample(random.Random(5), 4) for _ in range(2)]
    assert draws[0] == draws[1]


def test_a_logarithmic_range_is_searched_evenly_in_its_logarithm():
    parameter = Parameter("t", default=0.01, low=1e-4, high=1.0, log=True)
    assert parameter.grid(5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    rng = random.Random(1)
    below = sum(parameter.sample(rng) < 1e-2 for _ in range(2_000))
    assert 900 < below < 1_100


def test_an_integer_range_includes_both_ends():
    parameter = Parameter("k", default=2, low=1, high=3, integer=True)
    assert parameter.grid(3) == [1, 2, 3]
    assert parameter.grid(9) == [1, 2, 3]
    rng = random.Random(2)
    assert {parameter.sample(rng) for _ in range(100)} == {1, 2, 3}


def test_an_unknown_method_is_told_the_nearest():
    with pytest.raises(UserError, match="unknown method: 'tie'; the nearest known one is 'ties'"):
        method("tie")


def test_an_unknown_parameter_is_told_the_nearest():
    with pytest.raises(UserError, match="'densty'; the nearest known one is 'density'"):
        method("ties").merge(torch.ones(2, 3), densty=0.5)


@pytest.mark.parametrize("name", list(methods()))
def test_tuning_leaves_readings_and_flags_alone(name):
    entry = METHODS[name]
    flags = {parameter.name for parameter in entry.parameters if parameter.choices}
    for setting in (entry.defaults(3), entry.sample(random.Random(0), 3), *entry.grid(3)):
        assert not flags & set(setting)


def test_one_density_for_each_expert():
    experts = torch.tensor([[4.0, -1.0], [-2.0, 3.0]])
    merged = method("ties").merge(experts, density=[0.5, 1.0])
    # Of the first expert 4 is kept, of the second one both; 4 outvotes -2.
    torch.testing.assert_close(merged, torch.tensor([4.0, 3.0]))
    with pytest.raises(UserError, match="each of the 2 experts"):
        method("ties").merge(experts, density=[0.5])


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("ties", {"reading": "mergekt"}, "it takes paper or mergekit"),
        ("ties", {"normalize": 1}, "it takes true or false"),
        ("ties", {"scale": "2"}, "is no number"),
        ("ties", {"scale": True}, "is no number"),
        ("ties", {"scale": [1.0, 1.0]}, "give one for all experts"),
        ("ties", {"density": "high"}, "is no number"),
        ("ties", {"weights": ["a", "b"]}, "is no number"),
        ("dare_ties", {"seed": 1.5}, "is no whole number"),
        ("linear", {"weights": [1.0, -1.0]}, "which is 0"),
        ("arcee_fusion", {"spread": -1.0}, "not negative"),
        ("doge_ta", {"step": 0.0}, "above 0"),
        ("consensus_ta", {"agreement": 0}, "agreement 0 at least 1"),
        ("consensus_ta", {"strictness": -0.1}, "strictness -0.1 must be at least 0"),
        ("svc", {"floor": 0.0}, "above 0"),
        ("wudi", {"cutoff": 1.0}, r"\[0, 1\)"),
        ("ram", {"threshold": -1e-5}, "at least 0"),
    ],
)
def test_a_value_that_is_not_taken_is_named(name, parameters, says):
    with pytest.raises(UserError, match=says):
        method(name).merge(torch.ones(2, 3), torch.ones(3), **parameters)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], 0.5])
def test_weights_must_be_one_for_each_expert(weights):
    with pytest.raises(UserError, match="each of the 2 experts"):
        method("weighted_task_arithmetic").merge(torch.ones(2, 3), weights=weights)


def test_a_method_that_needs_the_seed_asks_for_it():
    with pytest.raises(UserError, match="needs the seed's tensor"):
        method("slerp").merge(torch.ones(2, 3))
    with pytest.raises(UserError, match="needs the seed's tensor"):
        method("karcher").merge(torch.ones(2, 3), reading="mergekit")


def test_no_experts_is_an_error():
    with pytest.raises(UserError, match="at least 1 experts, not 0"):
        method("linear").merge(torch.ones(0, 3))


def test_the_registry_cannot_be_changed_from_outside():
    methods().clear()
    assert methods() == METHODS


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nuslerp", {"flatten": False}),
        ("nuslerp", {"flatten": False, "row_wise": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_a_number_is_merged_as_a_vector_of_one_entry_is(name, parameters):
    numbers = torch.tensor([2.0, 3.0])
    merged = method(name).merge(numbers, torch.tensor(1.0), **parameters)
    assert merged.shape == ()
    whole = method(name).merge(numbers[:, None], torch.ones(1), **parameters)
    torch.testing.assert_close(merged, whole[0])


@pytest.mark.parametrize("name", list(methods()))
def test_a_tensor_without_entries_stays_one(name):
    found = method(name)
    for shape in ((0,), (0, 4), (4, 0)):
        experts = torch.zeros(found.experts or 3, *shape)
        assert found.merge(experts, torch.zeros(shape)).shape == shape
