"""What holds for every method, whatever the task vectors."""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdev.algorithms.library import Method, methods

METHODS = methods()
# KnOTS has an order where singular values are equal, as those of sparse experts are, or zero: their directions are
# arbitrary, and it trims them entry by entry.
SYMMETRIC = sorted(set(METHODS) - {"dare_linear", "dare_ties", "della", "knots"})
# Their parameters or the seed's tensor are in units of the weights.
FIXED_SCALE = {"nearswap", "ram", "slerp", "arcee_fusion", "doge_ta"}
# The same formulas as mergekit reads them.
READINGS = sorted(
    name
    for name, entry in METHODS.items()
    if any(parameter.name == "reading" for parameter in entry.parameters)
)
BLOCKWISE = [
    "weighted_task_arithmetic",
    "ties",
    "breadcrumbs",
    "sce",
    "magmax",
    "nearswap",
    "arcee_fusion",
    "ram",
    "pcb",
    "emr_unified",
    "consensus_ta",
    "wudi",
]
# Under these parameters nothing is trimmed, dropped, clipped or damped.
NEUTRAL = {
    "linear": {},
    "task_arithmetic": {"scale": 1.0},
    "weighted_task_arithmetic": {},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0, "scale": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0, "scale": 1.0},
    "model_stock": {},
    "karcher": {},
    "multislerp": {},
    "sce": {"density": 1.0},
    "magmax": {},
    "nearswap": {"t": 1e6},
    "ram": {"threshold": 0.0},
    "pcb": {"density": 1.0},
    "emr_unified": {},
    "consensus_ta": {"scale": 1.0},
    "tsv_m": {},
    "wudi": {},
    "knots": {"density": 1.0},
    "svc": {},
}

shapes = st.sampled_from([(1,), (1, 1), (7,), (3, 5), (6, 4), (5, 5), (2, 3, 2), (40, 30)])
scales = st.sampled_from([1e-3, 1e-2, 1.0, 10.0])


@st.composite
def stacks(draw: st.DrawFn) -> Tensor:
    """Task vectors of 1 to 4 experts: related, of several sizes, some sparse, some rounded to bfloat16."""
    experts, shape = draw(st.integers(1, 4)), draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shared = draw(st.sampled_from([0.0, 0.5, 3.0])) * torch.randn(shape, generator=generator)
    stack = shared + torch.randn(experts, *shape, generator=generator)
    stack = stack * (torch.rand(stack.shape, generator=generator) < draw(st.sampled_from([1.0, 0.6, 0.1])))
    stack = stack * draw(scales)
    if draw(st.booleans()):
        stack = stack.to(torch.bfloat16).to(torch.float32)
    if draw(st.booleans()):
        stack[draw(st.integers(0, experts - 1))] = 0.0
    return stack


def fit(method: Method, stack: Tensor) -> Tensor:
    """Give the method the number of experts that it takes."""
    return stack if method.experts is None else stack[[0, -1]]


def merge(method: Method, stack: Tensor, **parameters: object) -> Tensor:
    seed_tensor = torch.linspace(-1.0, 1.0, stack[0].numel()).reshape(stack.shape[1:])
    return method.merge(stack, seed_tensor, **parameters)


@pytest.mark.parametrize("name", METHODS)
@given(stack=stacks(), seed=st.integers(0, 1_000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_merges_whatever_it_gets(name, stack, seed):
    method = METHODS[name]
    stack = fit(method, stack)
    before = stack.clone()
    for parameters in ({}, method.sample(random.Random(seed), len(stack))):
        merged = merge(method, stack, **parameters)
        assert merged.shape == stack.shape[1:]
        assert merged.dtype == torch.float32
        assert merged.isfinite().all()
        assert torch.equal(merged, merge(method, stack, **parameters))
    assert torch.equal(stack, before), "changed its input"


@pytest.mark.parametrize("name", READINGS)
@given(stack=stacks())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_mergekits_reading_merges_whatever_it_gets(name, stack):
    method = METHODS[name]
    stack = fit(method, stack)
    before = stack.clone()
    if name == "multislerp":  # refuses directions that cancel each other, as mergekit does
        norms = stack.flatten(1).norm(dim=1).reshape(-1, *[1] * (stack.dim() - 1))
        assume((stack / norms.clamp(min=1e-8)).sum(dim=0).norm() > 1e-3)
    merged = merge(method, stack, reading="mergekit")
    assert merged.shape == stack.shape[1:]
    assert merged.isfinite().all()
    assert torch.equal(merged, merge(method, stack, reading="mergekit"))
    assert torch.equal(stack, before), "changed its input"


@pytest.mark.parametrize("name", SYMMETRIC)
@given(stack=stacks(), order=st.permutations(range(4)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_order_of_the_experts_does_not_matter(name, stack, order):
    method = METHODS[name]
    stack = fit(method, stack)
    shuffled = stack[[index for index in order if index < len(stack)]]
    one, other = merge(method, stack), merge(method, shuffled)
    assert (one - other).norm() <= 1e-3 * one.norm() + 1e-7


def test_the_order_of_the_experts_does_not_matter_to_knots_where_singular_values_differ():
    stack = torch.randn(3, 12, 10, generator=torch.Generator().manual_seed(0))
    one, other = merge(METHODS["knots"], stack), merge(METHODS["knots"], stack[[2, 0, 1]])
    assert (one - other).norm() <= 1e-3 * one.norm()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_order_of_the_rows_does_not_matter_in_large_tensors(name):
    """They are merged block by block: with the rows turned about every entry lies in another block."""
    method = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    stack = (0.01 * torch.randn(3, 900, 300, generator=generator)).bfloat16().float()
    seed_tensor = torch.randn(900, 300, generator=generator)
    merged = method.merge(stack, seed_tensor)
    turned = method.merge(stack.flip(1), seed_tensor.flip(0)).flip(0)
    assert (turned - merged).norm() <= 1e-5 * merged.norm()


@pytest.mark.parametrize("name", sorted(set(METHODS) - FIXED_SCALE))
@given(stack=stacks())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_twice_the_task_vectors_merge_to_twice_as_much(name, stack):
    method = METHODS[name]
    stack = fit(method, stack)
    once, twice = merge(method, stack), merge(method, 2.0 * stack)
    assert (twice - 2.0 * once).norm() <= 1e-4 * once.norm() + 1e-7


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1,), (5,), (4, 3), (2, 2, 2)])
def test_zero_task_vectors_change_nothing(name, shape):
    method = METHODS[name]
    stack = torch.zeros(method.experts or 3, *shape)
    torch.testing.assert_close(merge(method, stack), torch.zeros(shape))


@pytest.mark.parametrize("name", NEUTRAL)
@given(stack=stacks())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_one_expert_stays_as_it_is(name, stack):
    merged = merge(METHODS[name], stack[:1], **NEUTRAL[name])
    assert (merged - stack[0]).norm() <= 1e-4 * stack[0].norm()


# TSV-M keeps a part of the directions, and WUDI's cutoff leaves weak ones alone: tested on diagonals.
@pytest.mark.parametrize("name", sorted(set(NEUTRAL) - {"tsv_m", "wudi"}))
@given(stack=stacks())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_equal_experts_keep_their_direction(name, stack):
    """Some return the one task vector, some the sum of the three; none bends it."""
    expert = stack[0]
    merged = merge(METHODS[name], expert.repeat(3, *[1] * expert.dim()), **NEUTRAL[name])
    factor = (merged * expert).sum() / expert.square().sum().clamp(min=1e-30)
    assert (merged - factor * expert).norm() <= 1e-4 * merged.norm() + 1e-7
    assert expert.norm() == 0 or 0.9 <= factor <= 3.1
