import re
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdev.factory import lanes
from selfdev.factory.lanes import in_lanes, side_by_side
from selfdev.factory.sampling import Sampler
from tiny import tiny_model, tiny_tokenizer

PROMPTS, SEEDS = [[1, 2, 3, 4, 5], [6, 7, 8]], [list(range(9)), list(range(20, 27))]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(), max_size=40), st.integers(1, 8))
def test_lanes_hold_neighbours_and_everybody_once(items: list[int], count: int) -> None:
    shares = in_lanes(items, count)
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_few_rows_have_one_lane() -> None:
    assert [lanes.lanes(rows) for rows in (1, 24, 47, 48, 500)] == [1, 1, 1, 2, 2]


def test_programs_are_those_of_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    few = Sampler(1.0, 1.0, 12, re.compile("[0-4]"), batch=4)
    alone = few(model, tokenizer, PROMPTS, SEEDS)
    monkeypatch.setattr(lanes, "LEAST", 2)
    counts: list[tuple[int, int]] = []
    both = few(model, tokenizer, PROMPTS, SEEDS, lambda *count: counts.append(count))
    assert [[s.tokens for s in group] for group in both] == [[s.tokens for s in group] for group in alone]
    assert counts[-1] == (16, sum(len(s.tokens) for group in both for s in group))
    assert few(model, tokenizer, PROMPTS, SEEDS) == both
    assert torch.get_num_threads() == 2


def test_an_interrupt_ends_every_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(finished: int, tokens: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "LEAST", 2)
    with pytest.raises(KeyboardInterrupt):
        Sampler(1.0, 1.0, 12, re.compile("[0-4]"), batch=4)(
            tiny_model(), tiny_tokenizer(), PROMPTS, SEEDS, interrupt
        )
    assert torch.get_num_threads() == 2


def test_a_failure_in_one_lane_ends_the_others() -> None:
    def fails(stop: Event) -> None:
        raise ValueError("broken")

    def waits(stop: Event) -> None:
        assert stop.wait(60)

    with pytest.raises(ValueError, match="broken"):
        side_by_side([waits, fails])
