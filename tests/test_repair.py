"""The working neighbours of failing programs."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdev.algorithms.repair import neighbours, repair
from selfdev.algorithms.screening import History, Screen
from selfdev.algorithms.source import Form, read_program, rewrite, unwrap_short, wrap_short
from selfdev.sandbox import Limits, Sandbox

SLIPS = {
    "a sum over everything": (
        "def merge_a(deltas):\n    size = deltas.abs().sum()\n    return size * deltas.tanh() * deltas.abs().sum()\n",
        "(size * deltas.tanh() * deltas.abs().sum()).sum(dim=0)",
    ),
    "a dimension left out": (
        "def merge_b(deltas):\n    return torch.cumsum(deltas.abs().sqrt() * deltas)[0] * deltas[1].abs()\n",
        "torch.cumsum(deltas.abs().sqrt() * deltas, dim=0)",
    ),
    "a name that nobody gave": (
        "def merge_c(deltas):\n    heavy = deltas.abs().sqrt() * deltas\n    return weights.sum(dim=0)\n",
        "return heavy.sum(dim=0)",
    ),
    "a method that tensors do not have": (
        "def merge_d(deltas):\n    return (deltas.abs().root() * deltas).sum(dim=0)\n",
        "(deltas.abs() * deltas).sum(dim=0)",
    ),
}


@pytest.fixture(scope="module")
def screen() -> Screen:
    with Sandbox(Limits(wall_seconds=5)) as box:
        yield Screen(box)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_mended_where_it_is(slip: str, screen: Screen) -> None:
    failing, mended = SLIPS[slip]
    source = wrap_short(failing)
    assert screen(source, History()).novelty is None
    found = repair(source, screen, History(), tries=24)
    assert found is not None
    assert mended in found[0]
    assert found[1].novelty == "new"


def test_a_repair_repeats_nothing_that_is_known(screen: Screen) -> None:
    history = History()
    source = wrap_short(SLIPS["a method that tensors do not have"][0])
    first = repair(source, screen, history, tries=24)
    assert first is not None
    history.add("first", first[1])
    second = repair(source, screen, history, tries=24)
    assert second is None or second[0] != first[0]


def test_what_cannot_be_mended_has_no_repair(screen: Screen) -> None:
    hopeless = wrap_short("def merge_e(deltas):\n    raise ValueError('no')\n")
    assert repair(hopeless, screen, History(), tries=24) is None
    assert repair("def merge_models(model_dict, device:\n", screen, History(), tries=24) is None


def test_programs_in_the_contracts_form_are_mended_too(screen: Screen) -> None:
    source = (
        "import torch\n\ndef merge_models(model_dict, device):\n"
        "    stacked = torch.stack(list(model_dict.values()))\n    return stacked.abs().sqrt() * stacked\n"
    )
    found = repair(source, screen, History(), tries=8)
    assert found is not None
    assert "(stacked.abs().sqrt() * stacked).sum(dim=0)" in found[0]


@given(st.sampled_from([source for source, _ in SLIPS.values()]), st.integers(0, 60))
def test_neighbours_are_different_programs_that_parse_and_no_more_than_asked(source: str, limit: int) -> None:
    found = list(neighbours(source, limit))
    assert len(found) <= limit
    assert len({source, *found}) == len(found) + 1
    for each in found:
        ast.parse(each)
    assert found == list(neighbours(source, 60))[: len(found)]


@pytest.mark.parametrize("form", list(Form))
def test_a_rewritten_completion_reads_as_the_other_program(form: Form) -> None:
    short = {"old": "def merge_a(deltas):\n    return 1\n", "new": "def merge_a(deltas):\n    return 2\n"}
    if form is Form.SHORT:
        source, other = wrap_short(short["old"]), wrap_short(short["new"])
        text = unwrap_short(source).removeprefix("def merge_") + "\n\nnothing"
    else:
        source = "def merge_models(model_dict, device):\n    return 1\n"
        other = source.replace("1", "2")
        text = f"Sure:\n```python\n{source}```\n"
    assert read_program(text, form) == source
    assert read_program(rewrite(text, form, other), form) == other
