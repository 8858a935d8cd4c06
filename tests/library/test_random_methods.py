"""Methods that drop entries at random: what is kept, how often, and by whose generator."""

import pytest
import torch

from selfdev.algorithms.library import method

DRAWN = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]


def test_dare_keeps_everything_at_density_one():
    experts = torch.tensor([[1.0, 3.0], [3.0, -1.0]])
    torch.testing.assert_close(
        method("dare_linear").merge(experts, density=1.0, scale=0.5), torch.tensor([2.0, 1.0])
    )
    torch.testing.assert_close(method("dare_ties").merge(experts, density=1.0), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_rescales_what_it_keeps(density):
    merged = method("dare_linear").merge(torch.full((1, 200_000), 2.0), density=density, scale=1.0)
    kept = merged != 0
    torch.testing.assert_close(merged[kept], torch.full_like(merged[kept], 2.0 / density))
    assert kept.float().mean().item() == pytest.approx(density, abs=0.005)


def test_dropped_entries_do_not_vote():
    experts = torch.tensor([[5.0], [-1.0]]).repeat(1, 2_000)
    merged = method("dare_ties").merge(experts, density=0.5)
    # Both kept or the first alone: 5 / 0.5. The second alone: -1 / 0.5. None: 0.
    assert set(merged.tolist()) == {10.0, -2.0, 0.0}


def test_della_keeps_large_entries_more_often():
    row = torch.arange(1.0, 101.0)
    merged = method("della").merge(row.repeat(1, 2_000, 1), density=0.5, epsilon=0.4)
    kept = (merged != 0).float()
    # Keep probabilities fall from 0.7 to 0.3 over the ranks: 0.6 in the larger half, 0.4 in the other.
    assert kept[:, 50:].mean().item() == pytest.approx(0.602, abs=0.01)
    assert kept[:, :50].mean().item() == pytest.approx(0.402, abs=0.01)
    largest = merged[:, -1]
    torch.testing.assert_close(largest[largest != 0], torch.full_like(largest[largest != 0], 100.0 / 0.7))


def test_della_with_nothing_to_drop_is_ties_without_trimming():
    experts = torch.tensor([[4.0, -1.0, 2.0], [-2.0, 3.0, 1.0]])
    torch.testing.assert_close(
        method("della").merge(experts, density=1.0, epsilon=0.0), torch.tensor([4.0, 3.0, 1.5])
    )


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_the_seed_alone_decides_what_is_dropped(name):
    experts = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = method(name).merge(experts, seed=7)
    before = torch.random.get_rng_state()
    again = method(name).merge(experts, seed=7)
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"
    assert not torch.equal(first, method(name).merge(experts, seed=8))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
@pytest.mark.parametrize("reading", ["paper", "mergekit"])
def test_neither_threads_nor_the_default_type_change_the_drawing(name, reading):
    experts = torch.randn(3, 300, 300, generator=torch.Generator().manual_seed(0))
    first = method(name).merge(experts, seed=7, reading=reading)
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        torch.set_default_dtype(torch.float64)
        again = method(name).merge(experts, seed=7, reading=reading)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
    assert torch.equal(first, again)


def test_the_drawing_stays_what_it_was():
    """Archives hold scores of these methods: another drawing from the same seed would be another model."""
    merged = method("dare_linear").merge(torch.ones(1, 12), density=0.5, scale=1.0, seed=3)
    assert merged.tolist() == DRAWN
