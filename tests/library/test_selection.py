"""Values of a rank in long rows, which are found by a sample: the very ones that sorting finds."""

import pytest
import torch

from selfdev.algorithms.library.blocks import Stack
from selfdev.algorithms.library.trimming import magnitude_thresholds, magnitudes_at, smallest

ENTRIES = 200_000


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(ENTRIES, generator=generator)
    return {
        "normal": normal,
        "on a grid": normal.bfloat16().float(),
        "all equal": torch.ones(ENTRIES),
        "mostly zero": normal * (torch.rand(ENTRIES, generator=generator) < 0.05),
        "sorted": normal.sort().values,
        "few values": (2 * normal).round(),
        # The sample takes every fifteenth entry, and these are all that it sees.
        "misleading": torch.where(torch.arange(ENTRIES) % 15 == 0, 1e6, normal),
        "one outlier": torch.cat([normal[:-1], torch.tensor([1e30])]),
    }


@pytest.mark.parametrize("kind", rows())
@pytest.mark.parametrize("rank", [1, 2, 1_000, ENTRIES // 2, ENTRIES - 1, ENTRIES])
def test_is_what_sorting_finds(kind, rank):
    row = rows()[kind]
    assert smallest(row, rank) == row.sort().values[rank - 1]
    assert magnitudes_at([[rank]], Stack.of(row[None])).item() == row.abs().sort().values[rank - 1]


def test_thresholds_of_several_rows_of_a_matrix():
    stack = torch.stack([rows()["normal"], rows()["mostly zero"]]).reshape(2, 400, 500)
    expected = [row.abs().flatten().sort(descending=True).values[ENTRIES // 5 - 1] for row in stack]
    assert magnitude_thresholds(Stack.of(stack), 0.2).flatten().tolist() == [
        value.item() for value in expected
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_whose_sample_misleads_does_not_mislead_the_others(threads):
    stack = torch.stack([rows()[kind] for kind in ("normal", "misleading", "on a grid")])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = magnitudes_at([[7, 9], [ENTRIES // 2, 3], [ENTRIES, 1]], Stack.of(stack))
    finally:
        torch.set_num_threads(before)
    ordered = stack.abs().sort().values
    assert found.tolist() == [
        [ordered[0, 6].item(), ordered[0, 8].item()],
        [ordered[1, ENTRIES // 2 - 1].item(), ordered[1, 2].item()],
        [ordered[2, -1].item(), ordered[2, 0].item()],
    ]


@pytest.mark.parametrize("rank", [1, 2, 20, ENTRIES // 5, ENTRIES - 1, ENTRIES])
def test_no_row_lies_in_memory_as_a_whole(rank):
    flat, largest = rows()["normal"][None], 0

    def part(entries):
        nonlocal largest
        largest = max(largest, len(range(*entries.indices(ENTRIES))))
        return flat[:, entries]

    assert magnitudes_at([[rank]], Stack(1, ENTRIES, part)).item() == flat.abs().sort().values[0, rank - 1]
    assert largest < ENTRIES
