"""What screening calls trivial, known, repeated and new, in the real jail."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdev.algorithms.screening import (
    PROBES,
    TOLERANCE,
    Behaviour,
    History,
    Novelty,
    Screen,
    Screening,
    explained_by_combination,
)
from selfdev.algorithms.source import Form, read_program
from selfdev.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def screen() -> Iterator[Screen]:
    with Sandbox(Limits(wall_seconds=5)) as box:
        yield Screen(box)


def screened(screen: Screen, body: str, history: History | None = None) -> Screening:
    return screen(read_program("x(deltas):\n" + body, Form.SHORT), history or History())


TRIVIAL = {
    "zero": "    return torch.zeros_like(deltas[0])\n",
    "copy of the last": "    return deltas[-1]\n",
    "copy of the first, by a detour over 1,000 entries": "    d = deltas[0]\n    return d if d.numel() > 1000 else d * 1.0\n",
    "scaled mean": "    return 0.7 * deltas.mean(0)\n",
    "weights": "    return sum((i + 1) * d for i, d in enumerate(deltas))\n",
    "mean with a speck": "    s = deltas\n    return s.mean(0) + 0.002 * s.abs().mean(0)\n",
}
KNOWN = {
    "an example": "    return deltas.median(dim=0).values\n",
    "an example with another factor": "    return 3.0 * deltas.median(dim=0).values\n",
    "magmax in other words": "    m = deltas[0]\n    for d in deltas[1:]:\n        m = torch.where(d.abs() > m.abs(), d, m)\n    return m\n",
}
NEW = {
    "rolled": "    return torch.roll(sum(deltas), 1, 0)\n",
    "a power": "    return sum(d.sign() * d.abs() ** 1.3 for d in deltas)\n",
}


@pytest.mark.parametrize("body", TRIVIAL.values(), ids=TRIVIAL)
def test_trivial(screen: Screen, body: str) -> None:
    found = screened(screen, body)
    assert found.novelty is Novelty.TRIVIAL
    assert found.distance is not None
    assert found.distance <= TOLERANCE


@pytest.mark.parametrize("body", KNOWN.values(), ids=KNOWN)
def test_known(screen: Screen, body: str) -> None:
    assert screened(screen, body).novelty is Novelty.KNOWN


@pytest.mark.parametrize("body", NEW.values(), ids=NEW)
def test_new_and_its_distance_to_the_nearest(screen: Screen, body: str) -> None:
    found = screened(screen, body)
    assert found.novelty is Novelty.NEW
    assert found.distance is not None
    assert found.distance > TOLERANCE
    assert found.nearest


def test_an_example_with_another_constant_is_known_by_its_form(screen: Screen) -> None:
    from selfdev.algorithms.examples import examples

    source = examples()["clipped"]
    changed = source.replace("1.5", "1.3").removeprefix("def merge_")
    assert changed != source.removeprefix("def merge_")
    found = screen(read_program(changed, Form.SHORT), History())
    assert (found.novelty, found.nearest) == (Novelty.KNOWN, "example clipped")


def test_repeated_by_form_and_by_behaviour(screen: Screen) -> None:
    history = History()
    first = screened(screen, NEW["rolled"])
    history.add("first", first)
    by_form = screened(screen, "    return torch.roll(sum(deltas), 2, 0)  # further\n", history)
    by_behaviour = screened(screen, "    s = deltas.mean(0)\n    return s.roll(1, dims=0)\n", history)
    assert [by_form.novelty, by_behaviour.novelty] == [Novelty.REPEATED] * 2
    for each in (by_form, by_behaviour):
        assert each.behaviour is not None
        assert each.distance == pytest.approx(
            each.behaviour.distance(history.behaviours[each.nearest]), rel=1e-3
        )
    assert by_form.nearest == by_behaviour.nearest == "first"
    assert by_form.canonical == first.canonical != by_behaviour.canonical
    # What repeats a repetition repeats the original.
    history.add("second", by_behaviour)
    third = screened(screen, "    s = deltas.mean(0)\n    return s.roll(3, dims=0)\n", history)
    assert (third.novelty, third.nearest) == (Novelty.REPEATED, "first")


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("    return (\n", "SyntaxError"),
        ("    return deltas[9]\n", "IndexError"),
        ("    return deltas[0].sum()\n", "ShapeMismatch"),
        ("    return deltas[0] / 0\n", "NonFinite"),
        (
            "    return sum(d.T for d in deltas).T + deltas[0].shape[1]\n",
            "IndexError",
        ),  # no columns in a vector
        ("    return deltas[0] + deltas[3]\n", "IndexError"),  # two experts are too few
    ],
)
def test_a_failure_has_a_class_and_no_novelty(screen: Screen, body: str, failure: str) -> None:
    found = screened(screen, body)
    assert (found.novelty, found.failure, found.behaviour) == (None, failure, None)
    assert found.error


def test_a_program_that_draws_random_numbers_is_rejected(screen: Screen) -> None:
    # Else DARE, with a mask of its own, would look like an invention.
    found = screened(screen, "    return sum(d * (torch.rand_like(d) < 0.5) / 0.5 for d in deltas)\n")
    assert (found.novelty, found.failure) == (None, "NonDeterministic")


@pytest.mark.parametrize(
    ("expression", "failure"),
    [("-" * 600 + "sum(deltas)", "TooDeep"), ("sum(deltas) * 1e38", "NonFinite")],
    ids=["nested", "huge"],
)
def test_what_cannot_be_compared_is_a_failure(screen: Screen, expression: str, failure: str) -> None:
    assert screened(screen, f"    return {expression}\n").failure == failure


def test_a_program_whose_two_runs_differ_is_rejected(screen: Screen) -> None:
    clock = "torch.serialization.sys.modules['time'].perf_counter_ns()"
    found = screened(screen, f"    s = deltas\n    return s.abs().mean(0) * ({clock} % 9973 + 1)\n")
    assert (found.novelty, found.failure) == (None, "NonDeterministic")


def test_a_program_cannot_count_its_calls(screen: Screen) -> None:
    body = "    x = [object() for _ in range(1 + len(kept))]\n    kept.append(x)\n    return sum(deltas) * (1 + len(kept))\n\n"
    source = (
        "import torch\nkept = []\n\ndef merge_models(model_dict, device):\n    deltas = list(model_dict.values())\n"
        + body
    )
    found = screen(source, History())
    # Every call sees the program defined anew, so state does not survive and this one is a scaled sum.
    assert found.novelty is Novelty.TRIVIAL


def test_probes_vary_as_promised() -> None:
    scales = [float(probe.task_vectors.abs().mean()) for probe in PROBES]
    assert min(scales) < 5e-3
    assert max(scales) > 1
    assert {len(probe.task_vectors) for probe in PROBES} == {2, 4}
    assert {probe.task_vectors[0].dim() for probe in PROBES} == {1, 2}
    assert any(probe.task_vectors[0].numel() > 1000 for probe in PROBES)
    assert any((probe.task_vectors == 0).float().mean() > 0.3 for probe in PROBES)
    assert all(
        a != b
        for probe in PROBES
        if probe.task_vectors[0].dim() == 2
        for a, b in [probe.task_vectors[0].shape]
    )


@given(st.integers(0, 9), st.floats(0.01, 100))
def test_distance_ignores_a_factor_and_survives_the_archive(seed: int, factor: float) -> None:
    stream = torch.Generator().manual_seed(seed)
    merged = [torch.randn(probe.task_vectors[0].shape, generator=stream) for probe in PROBES]
    one, other = Behaviour.of(merged), Behaviour.of([factor * out for out in merged])
    assert one.distance(other) == pytest.approx(0, abs=1e-6)
    assert Behaviour.from_bytes(one.to_bytes()).distance(one) < 1e-5
    assert one.distance_to_trivial() > 0.5


def test_real_tensors_are_checked_again() -> None:
    stream = torch.Generator().manual_seed(0)
    vectors = {
        name: {e: torch.randn(shape, generator=stream) for e in "abc"}
        for name, shape in {"x": (4, 6), "y": (9, 5)}.items()
    }
    same = {name: 0.2 * v["a"] + 0.5 * v["c"] for name, v in vectors.items()}
    assert explained_by_combination(same, vectors) < 1e-6
    other = same | {"y": 0.5 * vectors["y"]["a"] + 0.2 * vectors["y"]["c"]}
    assert explained_by_combination(other, vectors) > 0.1
    # By hand: the best fit of one output by one expert on two tensors is its projection.
    one = {"x": {"a": torch.tensor([3.0, 4.0])}, "y": {"a": torch.tensor([5.0, 0.0])}}
    # On each tensor in units of its expert's norm: (0.6, 0.8) and (1, 0); best factor 0.5.
    halves = {"x": torch.tensor([3.0, 4.0]), "y": torch.zeros(2)}
    # Of x half is left. Of y, 0.5 against a hundredth of what an equal share of the whole would be.
    assert explained_by_combination(halves, one) == pytest.approx(0.5 / (0.01 / 2**0.5))
    # An expert that is another one twice leaves no single solution.
    double = {name: {**v, "d": 2 * v["a"]} for name, v in vectors.items()}
    assert explained_by_combination(same, double) < 1e-6
