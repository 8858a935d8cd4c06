"""What a model has read, by whatever name its version of transformers has for that."""

import warnings

import torch

from selfdev.models.cache import layers, read
from tiny import tiny_model


def test_reading_in_two_parts_is_reading_at_once_and_asks_for_nothing_that_goes_away() -> None:
    model = tiny_model(vocabulary=11)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        at_once, whole = read(model, [1, 2, 3, 4, 5])
        _, begun = read(model, [1, 2])
        after, joined = read(model, [3, 4, 5], behind=begun)
        expected = model(torch.tensor([[1, 2, 3, 4, 5]])).logits[:, -1]
    assert {keys.shape[-2] for keys, _ in layers(joined)} == {5}
    torch.testing.assert_close(at_once, expected)
    torch.testing.assert_close(after, expected)
    for (keys, values), (its_keys, its_values) in zip(layers(joined), layers(whole), strict=True):
        torch.testing.assert_close(keys, its_keys)
        torch.testing.assert_close(values, its_values)
