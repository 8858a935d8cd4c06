"""Methods that take a matrix apart, on matrices whose decomposition is known by heart."""

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.library import method, spectrum
from selfdev.algorithms.library.spectrum import components
from selfdev.errors import UserError


def diagonals(*experts: list[float]) -> Tensor:
    return torch.stack([torch.diag(torch.tensor(values, dtype=torch.float32)) for values in experts])


def check(merged: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("least", [None, 0, 1, 5, 9])
def test_eigenvectors_of_large_matrices_are_those_of_small_ones(
    least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = matrix @ matrix.T  # of rank 5
    values, vectors = spectrum.eigen(product.clone(), least)
    monkeypatch.setattr(spectrum, "_LARGE", 7)
    its_values, its_vectors = spectrum.eigen(product.clone(), least)
    torch.testing.assert_close(its_values, values)
    assert its_vectors.shape == vectors.shape == (7, 7 if least is None else min(least, 7))
    torch.testing.assert_close(product @ its_vectors, its_vectors * values)
    torch.testing.assert_close(its_vectors.T @ its_vectors, torch.eye(len(values), dtype=torch.float64))


def test_tsv_m_keeps_the_strongest_directions_of_each_expert():
    check(method("tsv_m").merge(diagonals([3, 1], [1, 2])), diagonal(3, 2))


def test_tsv_m_shares_a_direction_between_experts_that_both_use_it():
    # Two columns e1 become e1 / sqrt(2) each, so that 2 and 2 give 2 / 2 + 2 / 2.
    check(method("tsv_m").merge(diagonals([2, 0], [2, 0])), diagonal(2, 0))


def test_tsv_m_makes_directions_orthogonal():
    experts = torch.zeros(2, 4, 4)
    experts[0, 0, 0] = 1.0
    experts[1, 0, 0] = experts[1, 1, 0] = 1.0
    merged = method("tsv_m").merge(experts)
    # Left vectors at 0 and 45 degrees turn into the nearest orthonormal pair, at -22.5 and 67.5 degrees. The
    # right ones are both e1 and share it with 1 / sqrt(2) each. The singular values are 1 and sqrt(2).
    angle = torch.tensor(22.5).deg2rad()
    first = torch.stack([torch.cos(angle), -torch.sin(angle)])
    second = torch.stack([torch.sin(angle), torch.cos(angle)])
    expected = torch.zeros(4, 4)
    expected[:2, 0] = (first + 2**0.5 * second) / 2**0.5
    check(merged, expected)


def test_tsv_m_of_one_expert_is_that_expert():
    matrix = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    check(method("tsv_m").merge(matrix), matrix[0])


def test_iso_c_makes_all_singular_values_equal():
    check(method("iso_c").merge(diagonals([2, 1], [1, 0])), diagonal(2, 2))


def test_iso_c_keeps_the_directions_of_a_matrix_that_is_not_square():
    experts = torch.tensor([[[3.0, 0.0, 0.0], [0.0, -1.0, 0.0]]])
    check(method("iso_c").merge(experts, scale=0.5), torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))


def test_iso_c_adds_no_direction_that_the_sum_lacks():
    check(method("iso_c").merge(diagonals([4, 2, 0], [0, 0, 0])), diagonal(2, 2, 0))


def test_iso_cts_adds_a_direction_of_each_expert():
    # Common: 8 along the first axis. Left of the experts: 1 along the second, 2 along the third. Mean 11 / 3.
    merged = method("iso_cts").merge(diagonals([4, 1, 0], [4, 0, 2]), common_share=1 / 3)
    check(merged, diagonal(11 / 3, 11 / 3, 11 / 3))


def test_iso_cts_with_all_in_common_is_iso_c():
    experts = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    check(method("iso_cts").merge(experts, common_share=1.0), method("iso_c").merge(experts))


def test_iso_cts_takes_no_rounding_for_a_direction():
    """Experts of rank 4, as LoRA makes them: outside of the sum's span nothing of theirs is left."""
    generator = torch.Generator().manual_seed(3)
    experts = 0.01 * torch.randn(3, 64, 4, generator=generator) @ torch.randn(3, 4, 64, generator=generator)
    merged = method("iso_cts").merge(experts)
    nudged = method("iso_cts").merge(experts * (1 + 1e-7 * torch.randn(3, 64, 64, generator=generator)))
    assert (merged - nudged).norm() < 1e-4 * merged.norm()
    span = torch.linalg.svd(torch.cat(list(experts), dim=1), full_matrices=False).U[:, :12]
    assert (merged - span @ (span.T @ merged)).norm() < 1e-4 * merged.norm()


def test_iso_cts_refuses_an_impossible_share():
    with pytest.raises(UserError, match="common_share"):
        method("iso_cts").merge(diagonals([1, 1]), common_share=1.5)


def test_wudi_leaves_the_sum_where_experts_do_not_interfere():
    check(method("wudi").merge(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])), torch.tensor([[1.0, 1.0]]))


def test_wudi_counts_what_experts_share_once():
    # Losses (m - 2)^2 and (m - 1)^2 along the first input: 1.5. The second input belongs to one expert alone.
    experts = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]], [[0.0, 7.0]]])
    check(method("wudi").merge(experts), torch.tensor([[1.5, 7.0]]))


@pytest.mark.parametrize("shape", [(3, 20), (12, 20), (20, 20), (30, 8)])
def test_wudi_is_that_of_its_formula_in_float64(shape):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, *shape, generator=generator).double()
    vectors[2] = 0
    grams = vectors.mT @ vectors / vectors.square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    inverse = torch.linalg.pinv(grams.sum(dim=0), rtol=0.01, hermitian=True)
    total = vectors.sum(dim=0)
    expected = total + ((vectors - total) @ grams @ inverse).sum(dim=0)
    merged = method("wudi").merge(vectors.float(), cutoff=0.01)
    torch.testing.assert_close(merged.double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (15, 15)])
def test_components_are_those_of_a_decomposition_in_float64(shape):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 5, generator=generator).double())[0] for n in shape)
    values = torch.tensor([3.0, 1.0, 0.1, 1e-2, 1e-3]).double()
    found = components((left * values @ right.T).float())
    torch.testing.assert_close(found[1].double(), values, rtol=1e-4, atol=1e-6)
    for mine, known in ((found[0], left), (found[2], right)):
        torch.testing.assert_close(
            (mine.double() * known).sum(dim=0).abs(), torch.ones(5).double(), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(mine.T @ mine, torch.eye(5), rtol=0, atol=1e-3)
    assert [len(each.T) for each in components(torch.zeros(shape))[::2]] == [0, 0]
    assert components((left * values @ right.T).float(), 2)[1].tolist() == pytest.approx([3.0, 1.0])


def test_wudi_leaves_weak_directions_to_the_sum():
    experts = torch.stack([diagonal(2, 0.01), diagonal(1, 0.01)])
    check(method("wudi").merge(experts, cutoff=0.1), diagonal(1.5, 0.02))
    check(method("wudi").merge(experts, cutoff=1e-6), diagonal(1.5, 0.01))


def test_doge_gives_every_expert_back_its_own_length():
    # Factors 1/2 and 1: the sum is (1, 1). The first expert moves by 2 * 1 along its own change where 4 is its
    # square; the correction makes that 4, and the second, whose 1 is there, has nothing to correct.
    experts = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    merge = method("doge_ta").merge
    check(merge(experts, step=1.0, density=1.0), torch.tensor([[2.0, 1.0]]))
    check(merge(experts, step=1.0, density=1.0, scale=0.5), torch.tensor([[1.0, 0.5]]))
    # Trimmed to one entry each, where the correction is 2/3: 1/2 * (2 + 2/3) and 1.
    check(merge(experts, step=1.0, density=0.5), torch.tensor([[4 / 3, 1.0]]))


def test_doge_corrects_nothing_in_the_shared_subspace():
    # Both experts are strongest in the first row, which is half of the rank. Factors 1/5 each: norms are 5.
    experts = torch.stack([diagonal(4, 3), diagonal(4, 3)])
    merged = method("doge_ta").merge(experts, step=1.0, density=1.0, shared=0.5)
    # The sum is 2/5 of (4, 3); the second row is corrected to 3.
    check(merged, diagonal(1.6, 3))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 2)])
def test_doge_adds_tensors_that_are_no_matrices_at_one_length(shape):
    expert = torch.zeros(shape)
    expert.view(-1)[0] = 4.0
    check(method("doge_ta").merge(torch.stack([expert, -0.5 * expert]), step=0.1, density=1.0), 0.0 * expert)
    check(method("doge_ta").merge(expert[None], step=0.1), 0.1 * expert / 4.0)


def test_knots_merges_in_the_common_basis():
    check(
        method("knots").merge(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), density=1.0),
        torch.tensor([[1.0, 2.0]]),
    )
    check(
        method("knots").merge(torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]]), density=1.0),
        torch.tensor([[2.0, 4.0]]),
    )


@pytest.mark.parametrize("shape", [(2, 30, 5), (3, 6, 40), (3, 12, 4), (2, 9, 9)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_is_that_of_a_decomposition_in_float64(shape, density):
    """Signs and thresholds hang on the singular vectors: those of float32 differ by a percent here."""
    experts = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(torch.cat(tuple(experts.double()), dim=1), full_matrices=False)
    parts = torch.stack(right.chunk(shape[0], dim=1)).float()
    expected = (left * values).float() @ method("ties").merge(parts, density=density)
    torch.testing.assert_close(
        method("knots").merge(experts, density=density), expected, atol=1e-5, rtol=1e-5
    )


def test_svc_counts_a_shared_direction_once():
    check(method("svc").merge(diagonals([3, 1], [3, 1])), diagonal(3, 1))


def test_svc_leaves_directions_of_one_expert_alone():
    check(method("svc").merge(diagonals([3, 0], [0, 2])), diagonal(3, 2))


def test_svc_calibrates_by_the_mean_coefficient():
    # Along the first axis the sum is 3: 1.5 times the first expert, 3 times the second. 2 / 4.5 stays.
    check(method("svc").merge(diagonals([2, 0], [1, 1])), diagonal(4 / 3, 1))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "svc"])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 2)])
def test_tensors_that_are_no_matrices_are_averaged(name, shape):
    experts = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    check(method(name).merge(experts, scale=0.5), 0.5 * experts.mean(dim=0))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "knots", "svc", "wudi", "doge_ta"])
def test_a_stack_of_matrices_is_merged_matrix_by_matrix(name: str) -> None:
    # As a mixture of experts stores those of all its experts in one tensor.
    experts = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    merged = method(name).merge(experts)
    for place in range(3):
        torch.testing.assert_close(merged[place], method(name).merge(experts[:, place]))
    assert not torch.allclose(merged, experts.mean(dim=0))
    # The kernel of a convolution is no stack of matrices.
    kernel = experts[..., :3].contiguous()
    assert torch.equal(method("tsv_m").merge(kernel), kernel.mean(dim=0))
