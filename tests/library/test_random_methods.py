"""Methods that drop entries at random: what is kept, how often, and by whose generator."""

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.errors import UserError

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


def test_della_refuses_probabilities_that_are_none():
    experts = torch.ones(2, 4)
    with pytest.raises(UserError, match="at least 0"):
        method("della").merge(experts, epsilon=[0.1, -0.1])
    with pytest.raises(UserError, match="smaller epsilon"):
        method("della").merge(experts, density=0.5, epsilon=-0.7, reading="mergekit")


def test_della_with_nothing_to_drop_is_ties_without_trimming():
    experts = torch.tensor([[4.0, -1.0, 2.0], [-2.0, 3.0, 1.0]])
    torch.testing.assert_close(
        method("della").merge(experts, density=1.0, epsilon=0.0), torch.tensor([4.0, 3.0, 1.5])
    )


# What seed 3 draws for three experts of four entries, to two digits. Kept is what lies below the probability.
SEED_3 = [[0.00, 0.11, 0.29, 0.03], [0.47, 0.06, 0.77, 0.74], [0.59, 0.89, 0.45, 0.80]]


def test_what_seed_3_draws():
    drawn = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, torch.tensor(SEED_3), rtol=0.0, atol=0.005)


def test_dare_by_hand():
    experts = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, -6.0, 7.0, 8.0], [-1.0, 1.0, 9.0, 2.0]])
    # At density 0.5 the first expert stays, of the second entries 0 and 1, of the third entry 2; all are doubled:
    #     2    4    6    8
    #    10  -12    0    0
    #     0    0   18    0
    linear, ties = method("dare_linear").merge, method("dare_ties").merge
    torch.testing.assert_close(
        linear(experts, density=0.5, seed=3, scale=0.5), torch.tensor([6.0, -4.0, 12.0, 4.0])
    )
    torch.testing.assert_close(
        linear(experts, density=0.5, seed=3, scale=1.0, normalize=True, rescale=False),
        torch.tensor([2.0, -4 / 3, 4.0, 4 / 3]),
    )
    # At entry 1 the votes sum to -8, and 4 has no part.
    torch.testing.assert_close(ties(experts, density=0.5, seed=3), torch.tensor([6.0, -12.0, 12.0, 8.0]))
    # Each expert by its own density: entry 2 of the first two is dropped, and entries 1 and 3 of the third.
    torch.testing.assert_close(
        linear(experts, density=[0.2, 0.75, 0.6], seed=3, scale=1.0),
        torch.tensor([5.0 + 20 / 3 - 5 / 3, 10.0 - 8.0, 15.0, 20.0 + 32 / 3]),
    )


def test_della_by_hand():
    experts = torch.tensor([[4.0, -1.0, 2.0, 3.0], [-2.0, 8.0, 6.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    # With density 0.5 and epsilon 0.4 the ranks 0 to 3 stay with the probabilities 0.7, 0.6, 0.5 and 0.4:
    #    0.7  0.4  0.5  0.6    all four drawn below
    #    0.4  0.7  0.6  0.5    0.06 is, but 0.47 is above 0.4
    #    0.4  0.5  0.6  0.7    0.45 is
    parameters = {"density": 0.5, "epsilon": 0.4, "seed": 3}
    # What stays is divided by them. At entry 1 the votes are -2.5 and 8 / 0.7, at entry 2 they are 4 and 5.
    torch.testing.assert_close(
        method("della").merge(experts, **parameters), torch.tensor([4 / 0.7, 8 / 0.7, 4.5, 5.0])
    )
    torch.testing.assert_close(
        method("della").merge(experts, elect=False, **parameters),
        torch.tensor([4 / 0.7, 8 / 0.7 - 2.5, 9.0, 5.0]),
    )


# Larger than what is drawn, ranked and merged at a time.
LARGE = (700, 300)


def large_experts() -> Tensor:
    experts = torch.randn(3, *LARGE, generator=torch.Generator().manual_seed(0))
    return experts.bfloat16().float()  # many magnitudes are equal


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_draws_large_tensors_as_a_whole(name):
    experts = large_experts()
    drawn = torch.rand(experts.shape, generator=torch.Generator().manual_seed(7))
    thinned = experts * (drawn < 0.3) / 0.3
    merged = method(name).merge(experts, density=0.3, scale=1.0, seed=7)
    assert torch.equal(merged, _added(thinned, elect=name == "dare_ties"))


@pytest.mark.parametrize("elect", [True, False])
def test_della_draws_large_tensors_as_a_whole(elect):
    experts = large_experts()
    drawn = torch.rand(experts.shape, generator=torch.Generator().manual_seed(7))
    ranks = experts.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chances = 0.5 + 0.2 - 0.4 * ranks / LARGE[1]
    thinned = experts * (drawn < chances) / chances
    merged = method("della").merge(experts, density=0.5, epsilon=0.4, elect=elect, seed=7)
    assert torch.equal(merged, _added(thinned, elect=elect))


def _added(thinned: Tensor, *, elect: bool) -> Tensor:
    total = thinned.sum(dim=0)
    if not elect:
        return total
    agreeing = thinned * (thinned * total.sign() > 0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


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
