"""The worked examples run on every kind of task vector, and no two of them do the same."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.examples import examples

SOURCES = examples()


def compiled(name: str) -> Callable[[list[Tensor]], Tensor]:
    scope = {"torch": torch}
    exec(SOURCES[name], scope)
    return lambda task_vectors: scope[f"merge_{name}"](torch.stack(task_vectors))


def probe(seed: int, shape: tuple[int, ...], experts: int, scale: float, density: float) -> list[Tensor]:
    """Related task vectors: a shared part, an own part, own norms, and a share of zeros."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    task_vectors = []
    for index in range(experts):
        own = torch.randn(shape, generator=generator)
        kept = torch.rand(shape, generator=generator) < density
        task_vectors.append(scale * (1 + 0.4 * index) * (0.5 * shared + own) * kept)
    return task_vectors


def two_zero_experts() -> list[Tensor]:
    first, second, third, fourth = probe(8, (6, 10), 4, 1.0, 1.0)
    return [first, torch.zeros_like(second), third, torch.zeros_like(fourth)]


PROBES = {
    "matrix": probe(1, (12, 20), 4, 1.0, 1.0),
    "tall": probe(2, (40, 30), 2, 1e-3, 0.6),
    "wide": probe(3, (5, 64), 8, 10.0, 0.9),
    "vector": probe(4, (33,), 4, 1e-2, 1.0),
    "short": probe(5, (7,), 2, 1.0, 1.0),
    "single entry": probe(6, (1,), 2, 1.0, 1.0),
    "sparse": probe(7, (16, 16), 4, 0.1, 0.05),
    "two zero experts": two_zero_experts(),
    "all zero": [torch.zeros(6, 4) for _ in range(3)],
    "all equal": [torch.full((4, 4), 0.5) for _ in range(3)],
}


def test_there_are_enough_examples_to_draw_from():
    assert len(SOURCES) >= 40
    assert list(SOURCES) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_one_short_function(name):
    lines = SOURCES[name].splitlines()
    assert lines[0] == f"def merge_{name}(deltas):"
    assert lines[1].startswith('    """')
    assert lines[1].endswith('."""')
    assert len(lines) <= 11
    assert "import" not in SOURCES[name]


@pytest.mark.parametrize("probe_name", PROBES)
@pytest.mark.parametrize("name", SOURCES)
def test_merges_every_probe(name, probe_name):
    merge, task_vectors = compiled(name), PROBES[probe_name]
    copies = [d.clone() for d in task_vectors]
    merged = merge(copies)
    assert merged.shape == task_vectors[0].shape
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(copies, task_vectors, strict=True)), "changed its input"
    assert torch.equal(merged, merge(copies))


@pytest.mark.parametrize("name", SOURCES)
def test_merged_task_vector_has_a_useful_size(name):
    for task_vectors in (PROBES["matrix"], PROBES["vector"]):
        size = compiled(name)(task_vectors).norm() / sum(task_vectors).norm()
        assert 0.2 <= size <= 1.1


def test_no_two_examples_merge_alike():
    directions = {}
    for name in SOURCES:
        outputs = [compiled(name)(PROBES[p]) for p in ("matrix", "tall", "wide", "sparse")]
        directions[name] = [o / o.norm() for o in outputs]
    for one, other in itertools.combinations(SOURCES, 2):
        distance = max((a - b).norm() for a, b in zip(directions[one], directions[other], strict=True))
        assert distance > 0.03, f"{one} and {other} differ by {distance:.4f} only"
