"""Attention within a pack against the same attention under a mask over all of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdev.errors import UserError
from selfdev.factory import packed_attention as module
from selfdev.factory.packed_attention import BLOCK, TOGETHER, Stretch, packed_attention, stretches

LAYER: Any = SimpleNamespace(layer_idx=0)


def under_a_mask(
    query: Tensor, key: Tensor, value: Tensor, prompt: int, lengths: list[int], scaling: float
) -> Tensor:
    """A token sees the prompt and its own completion, up to itself."""
    segment = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([prompt, *lengths]))
    sees = ((segment[:, None] == segment) | (segment == 0)).tril()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def draw(seed: int, heads: int, tokens: int) -> Tensor:
    found = torch.randn(
        1, heads, tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    return found.requires_grad_()


@settings(deadline=None)
@given(
    prompt=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 6), max_size=4),
    group=st.sampled_from([1, 3]),
    together=st.sampled_from([1, 4, 9]),
)
def test_values_and_gradients_are_those_under_a_mask(
    prompt: int, lengths: list[int], group: int, together: int
) -> None:
    tokens = prompt + sum(lengths)
    inputs = [draw(seed, heads, tokens) for seed, heads in enumerate((2 * group, 2, 2))]
    expected = under_a_mask(*inputs, prompt, lengths, 0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 5)  # so that prompts have several stretches,
        patch.setattr(module, "TOGETHER", together)  # and completions one or more, of one or more
        pack = stretches(prompt, lengths)
    found, _ = packed_attention(LAYER, *inputs, None, pack=pack, scaling=0.7)
    assert found.shape == (1, tokens, 2 * group, 4)
    # The weights of the softmax are of single precision.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    slope = draw(9, tokens, 2 * group).transpose(1, 2).detach().transpose(1, 2)
    wanted = torch.autograd.grad(expected, inputs, slope)
    for its, theirs in zip(torch.autograd.grad(found, inputs, slope), wanted, strict=True):
        torch.testing.assert_close(its, theirs, atol=1e-5, rtol=1e-5)


def test_a_pack_is_cut_every_so_many_tokens_of_its_prompt_and_of_its_completions() -> None:
    assert stretches(3, [2, 4]) == [Stretch(0, (0, 3)), Stretch(3, (3, 5, 9))]
    assert stretches(2 * BLOCK + 1, [])[1:] == [
        Stretch(BLOCK, (BLOCK, 2 * BLOCK)),
        Stretch(2 * BLOCK, (2 * BLOCK, 2 * BLOCK + 1)),
    ]
    long = TOGETHER + 1  # one that is longer has a stretch of its own
    assert stretches(1, [TOGETHER - 1, 1, 1, long, 2])[1:] == [
        Stretch(1, (1, TOGETHER, TOGETHER + 1)),
        Stretch(1, (TOGETHER + 1, TOGETHER + 2)),
        Stretch(1, (TOGETHER + 2, TOGETHER + 2 + long)),
        Stretch(1, (TOGETHER + 2 + long, TOGETHER + 4 + long)),
    ]


@pytest.mark.parametrize("more", [{"softcap": 50.0}, {"s_aux": torch.zeros(1)}])
def test_attention_of_another_kind_is_refused(more: dict[str, Any]) -> None:
    one = draw(0, 1, 2)
    with pytest.raises(UserError, match="take a model of another family"):
        packed_attention(LAYER, one, one, one, None, pack=stretches(1, [1]), scaling=1.0, **more)
