"""Methods that work entry by entry, on numbers that were worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.errors import UserError


def stacked(*experts: list[float]) -> Tensor:
    return torch.tensor(experts, dtype=torch.float32)


def check(merged: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_linear_is_the_mean():
    check(method("linear").merge(stacked([1, 3], [3, -1])), [2, 1])


def test_linear_weighs_the_mean():
    check(method("linear").merge(stacked([1, 3], [3, -1]), weights=[3.0, 1.0]), [1.5, 2])


def test_task_arithmetic_scales_the_sum():
    check(method("task_arithmetic").merge(stacked([1, 3], [3, -1]), scale=0.5), [2, 1])


def test_weighted_task_arithmetic_weighs_each_expert():
    merge = method("weighted_task_arithmetic").merge
    check(merge(stacked([1, 3], [3, -1]), weights=[0.5, 2.0]), [6.5, -0.5])
    check(merge(stacked([1, 3], [3, -1])), [2, 1])


def test_ties_trims_elects_and_averages():
    experts = stacked([4, -1, 2, 0.5], [-2, 3, 1, 0.1])
    # Kept: 4, 2 and -2, 3; elected signs + + + and none, so that -2 and -1 have no part.
    check(method("ties").merge(experts, density=0.5), [4, 3, 2, 0])
    check(method("ties").merge(experts, density=0.5, scale=0.5), [2, 1.5, 1, 0])
    # Nothing trimmed: the two that agree on entry 2 are averaged, those on entry 3 too.
    check(method("ties").merge(experts, density=1.0), [4, 3, 1.5, 0.3])


def test_ties_trims_each_expert_by_its_own_threshold():
    check(method("ties").merge(stacked([10, 9, 0, 0], [0, 0, 0.1, 0.2]), density=0.5), [10, 9, 0.1, 0.2])


def test_ties_keeps_at_least_one_entry():
    check(method("ties").merge(stacked([1, 5, 2]), density=0.01), [0, 5, 0])


def test_breadcrumbs_drops_both_ends():
    expert = stacked([1, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    merged = method("breadcrumbs").merge(expert, density=0.5, outliers=0.2, scale=1.0)
    check(merged, [0, 0, 0, -4, 5, -6, 7, -8, 0, 0])


def test_breadcrumbs_without_outliers_trims_as_ties_does():
    expert = stacked([4, -1, 2, 0.5])
    check(method("breadcrumbs").merge(expert, density=0.5, outliers=0.0, scale=2.0), [8, 0, 4, 0])


def test_weights_count_in_the_election_and_not_in_the_divisor():
    # Weighted: 1, -3 and 6, 4. The first is outvoted at entry 0; two agree on entry 1, and one at entry 2.
    experts = stacked([2, -6, 8], [3, 2, 0])
    check(method("ties").merge(experts, density=1.0, weights=[-0.5, 2.0]), [6, 3.5, -4])
    check(method("ties").merge(experts, density=1.0, weights=[-0.5, 2.0], normalize=False), [6, 7, -4])


def test_breadcrumbs_can_elect_and_normalise():
    experts = stacked([4, -1], [-2, 3])
    parameters = {"density": 1.0, "outliers": 0.0, "scale": 1.0}
    check(method("breadcrumbs").merge(experts, **parameters), [2, 2])
    check(method("breadcrumbs").merge(experts, normalize=True, **parameters), [1, 1])
    check(method("breadcrumbs").merge(experts, elect=True, **parameters), [4, 3])


def test_arcee_fusion_keeps_the_changes_that_stand_out():
    # The seed's rows are even. Softmax of (log 3, 0) is 3/4, 1/4, against 1/2, 1/2. Importances log 3 KL, 0, 0, 0:
    # quartiles at the ranks 0, 1 and 2 of 3 are 0, and so is the threshold with any spread: all is kept.
    seed = torch.zeros(2, 2)
    expert = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(method("arcee_fusion").merge(expert, seed), expert[0])
    # Four entries with importances 4 KL_1, 2 KL_1, KL_2 and 1/2 KL_2, where the second row hardly moves.
    # The ranks 0, 1, 2 of 3 are the 1/2 KL_2, KL_2 and 2 KL_1: the median and twice the spread exceed all but one.
    experts = torch.tensor([[[4.0, -2.0], [0.1, 0.05]]])
    kept = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(method("arcee_fusion").merge(experts, seed, spread=1.5), kept)
    # Without a spread the median itself is the threshold.
    kept = torch.tensor([[4.0, -2.0], [0.1, 0.0]])
    torch.testing.assert_close(method("arcee_fusion").merge(experts, seed, spread=0.0), kept)


def test_arcee_fusion_adds_what_it_keeps_of_several():
    experts = torch.tensor([[[4.0, -2.0], [0.1, 0.05]], [[0.1, 0.05], [4.0, -2.0]]])
    merged = method("arcee_fusion").merge(experts, torch.zeros(2, 2), scale=0.5)
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))


def test_magmax_takes_the_largest_magnitude():
    check(method("magmax").merge(stacked([1, -3, 2], [-4, 1, 0])), [-4, -3, 2])


def test_magmax_does_not_depend_on_order_where_magnitudes_are_equal():
    check(method("magmax").merge(stacked([2, 1], [-2, 1])), [0, 1])
    check(method("magmax").merge(stacked([-2, 1], [2, 1])), [0, 1])


def test_sce_selects_calculates_and_erases():
    # Variances 0, 4, 0, 1: entries 1 and 3 stay. Energies 20 and 8: weights 5/7 and 2/7. Entry 1 cancels.
    experts = stacked([1, 2, 0, 4], [1, -2, 0, 2])
    check(method("sce").merge(experts, density=0.5), [0, 0, 0, 24 / 7])


def test_sce_renormalises_the_weights_of_those_that_agree():
    # Energies 9 and 1; at both entries only the first expert has the elected sign.
    check(method("sce").merge(stacked([3, 0], [-1, 0]), density=1.0), [3, 0])


def test_model_stock_scales_the_mean_by_the_angle():
    cosine = 1 / math.sqrt(2)
    share = 2 * cosine / (1 + cosine)
    check(method("model_stock").merge(stacked([1, 0], [1, 1])), [share, share / 2])


def test_model_stock_of_three_experts():
    # Cosines 1, 0, 0: mean 1/3, share 3/3 / (1 + 2/3) = 0.6 of the mean (2/3, 1/3).
    check(method("model_stock").merge(stacked([1, 0], [1, 0], [0, 1])), [0.4, 0.2])


@pytest.mark.parametrize("second", [[0.0, 3.0], [-1.0, 0.0], [-2.0, 1.0]])
def test_model_stock_keeps_the_seed_where_experts_have_nothing_in_common(second):
    check(method("model_stock").merge(stacked([1, 0], second)), [0, 0])


def test_nearswap_clips_and_adds():
    experts = stacked([0.05, -0.3], [0.02, 0.4])
    check(method("nearswap").merge(experts[:1], t=0.1), [0.05, -0.1])
    check(method("nearswap").merge(experts, t=0.1), [0.07, 0.0])


def test_ram_averages_what_several_changed_and_keeps_the_rest():
    check(method("ram").merge(stacked([1, 0, 3, 1e-6], [3, 2, 0, 0])), [2, 2, 3, 0])


def test_emr_takes_the_largest_agreeing_magnitude():
    check(method("emr_unified").merge(stacked([3, -1, -2], [1, 2, 1.5])), [3, 2, -2])


def test_consensus_keeps_what_matters_to_two():
    # Entry 0: 2 >= 0.5 * 1 and 1 >= 0.5 * 2. Entry 1: 4 >= 0.5 * 0.5, but 0.5 < 0.5 * 4.
    experts = stacked([2, 4], [1, 0.5])
    check(method("consensus_ta").merge(experts, strictness=0.5, scale=1.0), [3, 0])
    check(method("consensus_ta").merge(experts, strictness=0.5, agreement=1, scale=1.0), [3, 4.5])


def test_pcb_weighs_entries_by_competition():
    e = math.e
    first = [2 * e**2 / (e**2 + 1) * 4 * e / (e + 1), 2 / (e**2 + 1) * 4 / (e + 1)]
    second = [2 * e / (e + 1) + 1, 2 / (e + 1) + 1]
    expected = [
        (first[0] * 2 + second[0] * 1) / (first[0] + second[0]),
        (first[1] * 0 + second[1] * 1) / (first[1] + second[1]),
    ]
    check(method("pcb").merge(stacked([2, 0], [1, 1]), density=1.0), expected)


def test_pcb_drops_the_entries_that_lose():
    check(method("pcb").merge(stacked([3, 1, -2, 0.5]), density=0.5), [3, 0, -2, 0])


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "della", "sce", "pcb", "breadcrumbs"])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_outside_its_range_is_refused(name, density):
    with pytest.raises(UserError, match="density"):
        method(name).merge(stacked([1, 2], [3, 4]), density=density)


def test_ties_rescaled_has_the_l1_norm_that_an_expert_had():
    # Of 4, 1 and 1 the largest is kept, and grows to their sum.
    check(method("ties").merge(stacked([4, 1, -1]), density=0.4, rescale=True), [6, 0, 0])


def test_breadcrumbs_rescaled_has_the_l1_norm_that_an_expert_had():
    # Of 4, 3, 2 and 1 the outlier 4 goes, 3 and 2 stay, and grow from 5 to 10.
    merged = method("breadcrumbs").merge(
        stacked([4, 3, -2, 1]), density=0.5, outliers=0.25, scale=1.0, rescale=True
    )
    check(merged, [0, 6, -4, 0])


def test_a_sum_of_weights_that_is_no_mean_needs_the_seed():
    # 0.5 (1 + 2) + 0.25 (1 + 4) is 2.75 itself, which is 1.75 from the seed.
    check(
        method("linear").merge(stacked([2], [4]), torch.ones(1), weights=[0.5, 0.25], normalize=False), [1.75]
    )
    with pytest.raises(UserError, match="needs the seed's tensor"):
        method("linear").merge(stacked([2], [4]), normalize=False)
