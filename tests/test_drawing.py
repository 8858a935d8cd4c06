import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdev.factory.drawing import draw

KNOWN = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()  # sorted: tokens 1, 3, 0, 2


def drawn(uniform: list[float], logits: Tensor = KNOWN, **settings: object) -> list[int]:
    tokens, _ = draw(logits.expand(len(uniform), -1), torch.tensor(uniform), **settings)  # type: ignore[arg-type]
    return tokens.tolist()


def test_the_likeliest_tokens_come_first() -> None:
    assert drawn([0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 0.999]) == [1, 1, 3, 3, 0, 0, 2, 2]


def test_log_probs_are_those_before_temperature_and_cuts() -> None:
    _, log_probs = draw(
        KNOWN[None] + 7, torch.tensor([0.7]), temperature=2.0, top_k=2
    )  # a constant changes nothing
    assert log_probs.tolist() == pytest.approx([math.log(0.3)], abs=1e-6)


def test_temperature_takes_roots() -> None:
    roots = [0.5**0.5, 0.3**0.5, 0.15**0.5, 0.05**0.5]
    first = roots[0] / sum(roots)
    assert drawn([first - 1e-3, first + 1e-3], temperature=2.0) == [1, 3]


def test_top_k_shares_out_what_it_keeps() -> None:
    assert drawn([0.62, 0.63, 0.999], top_k=2) == [1, 3, 3]  # 0.5 / 0.8 = 0.625
    assert drawn([0.999], top_k=1) == [1]
    assert drawn([0.999], top_k=100) == [2]


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    assert drawn([0.62, 0.63, 0.999], top_p=0.79) == [1, 3, 3]
    assert drawn([0.999], top_p=0.81) == [0]
    assert drawn([0.999], top_p=0.1) == [1]


def test_top_p_counts_shares_of_what_top_k_kept() -> None:
    assert drawn([0.999], top_p=0.84) == [0]  # 0.5 and 0.3 are less
    assert drawn([0.999], top_p=0.84, top_k=3) == [3]  # 0.8 / 0.95 = 0.842


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert drawn([0.999], min_p=0.29) == [0]  # 0.15 / 0.5 = 0.3
    assert drawn([0.999], min_p=0.31) == [3]
    assert drawn([0.999], min_p=1.0) == [1]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    masked = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    assert set(drawn([0.0, 0.3, 0.6, 0.99999], masked)) == {1, 3}


@settings(deadline=None, max_examples=40)
@example(seed=1, vocabulary=9999, spread=0.1, temperature=0.3, top_k=700, top_p=0.3, min_p=0.5)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from([5, 64, 5000, 9999]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 40, 700]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_what_is_sorted_in_part_is_drawn_as_if_all_were(
    seed: int, vocabulary: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocabulary, generator=random) * spread
    uniform = torch.rand(6, generator=random)
    cuts = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens, log_probs = draw(logits, uniform, **cuts)  # type: ignore[arg-type]
    for row in range(6):
        order = logits[row].argsort(descending=True)
        share = (logits[row].double()[order] / temperature).softmax(-1)
        share = share[: top_k or vocabulary] / share[: top_k or vocabulary].sum()
        keep = (share.cumsum(-1) - share < top_p) & (share >= min_p * share[0])
        cumulative = share[keep].cumsum(-1)
        place = int((order == tokens[row]).nonzero())
        low = float(cumulative[place - 1]) if place else 0.0
        high = float(cumulative[min(place, len(cumulative) - 1)])
        point = float(uniform[row]) * float(cumulative[-1])
        assert low - 1e-3 <= point <= high + 1e-3  # a rounded border lets one token more or less in
        assert place < len(cumulative) + 2
        assert log_probs[row].item() == pytest.approx(
            float(logits[row].log_softmax(-1)[tokens[row]]), abs=1e-4
        )
        alone, _ = draw(logits[row : row + 1], uniform[row : row + 1], **cuts)  # type: ignore[arg-type]
        assert alone.item() == tokens[row]


def test_what_is_not_allowed_goes_before_the_cuts() -> None:
    allowed = torch.tensor([True, False, True, True])  # 0.3, 0.15 and 0.05 are left, as if they were all
    uniform = torch.tensor([0.59, 0.61, 0.89, 0.91, 0.999])
    tokens, log_probs = draw(KNOWN.expand(5, -1), uniform, allowed=allowed.expand(5, -1))
    assert tokens.tolist() == [3, 0, 0, 2, 2]
    assert log_probs.exp().tolist() == pytest.approx([0.3, 0.15, 0.15, 0.05, 0.05], abs=1e-6)
    assert drawn([0.999], top_k=2, allowed=allowed[None]) == [0]
    assert drawn([0.999], top_p=0.59, allowed=allowed[None]) == [3]  # 0.3 / 0.5 = 0.6
    assert drawn([0.999], min_p=0.51, allowed=allowed[None]) == [3]  # 0.15 / 0.3 = 0.5


@given(st.integers(0, 2**31), st.floats(0, 0.999), st.integers(1, 90))
def test_only_what_is_allowed_is_drawn(seed: int, uniform: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, 300, generator=generator)
    allowed = torch.zeros(1, 300, dtype=torch.bool)
    allowed[0, torch.randperm(300, generator=generator)[:count]] = True
    [token], _ = draw(logits, torch.tensor([uniform]), allowed=allowed)
    assert allowed[0, token]
    [[place], _] = draw(logits[allowed][None], torch.tensor([uniform]))
    assert allowed[0].nonzero()[place, 0] == token
