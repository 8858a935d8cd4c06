"""TRL's DPOTrainer as a backend, and as the oracle of ours: where a step is one batch of both, they must agree."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selfdev.factory.refinement import Diverged, Outcome, Step, consult, refine
from selfdev.settings import RefinementSettings
from tiny import tiny_model, tiny_tokenizer

pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")

from selfdev.factory.trl_backend import refine_with_trl

PROMPTS = ((1, 2, 3, 4, 5), (7, 8, 9))
STEPS = [
    Step(PROMPTS[0], ((6, 7, 8), (9,), (10, 11, 12, 13)), ((0, 1), (2, 1))),
    Step(PROMPTS[1], ((6, 7, 9), (4, 4), (5, 6, 7, 8, 9), (3,)), ((0, 1), (2, 3))),
]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def with_trl(
    settings: RefinementSettings, reference: Any = None, steps: Sequence[Step] = STEPS, **more: Any
) -> tuple[PeftModel, Outcome]:
    model = adapted()
    return model, refine_with_trl(model, reference, tiny_tokenizer(), steps, settings, **more)


def assert_like_ours(settings: RefinementSettings, reference: Any = None, flip_rate: float = 0.0) -> None:
    ours = adapted()
    references = consult(reference or ours, STEPS, settings)
    expected = refine(ours, STEPS, references, settings, flip_rate=flip_rate)
    theirs, found = with_trl(settings, reference, flip_rate=flip_rate)
    for mine, its in zip(expected.losses, found.losses, strict=True):
        assert its.dpo == pytest.approx(mine.dpo, abs=1e-4)
        assert its.margin == pytest.approx(mine.margin, abs=1e-3)
        assert its.supervised == pytest.approx(mine.supervised, abs=1e-4)
    expected_weights = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    weights = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust"])
def test_the_same_losses_and_the_same_adapter_as_ours(loss: str) -> None:
    settings = RefinementSettings(loss=loss, beta=0.3, learning_rate=1e-3, epochs=3, pairs_a_step=2)
    assert_like_ours(settings, flip_rate=0.1)


def test_a_tokenizer_needs_no_padding_and_is_left_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    settings = RefinementSettings(learning_rate=1e-3, pairs_a_step=2)
    model = adapted()
    refine_with_trl(model, None, tokenizer, STEPS, settings)
    expected, _ = with_trl(settings)
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight)
    assert tokenizer.pad_token is None


def test_the_same_with_a_supervised_share_and_another_reference() -> None:
    settings = RefinementSettings(beta=0.3, learning_rate=1e-3, epochs=2, pairs_a_step=2, supervised=0.5)
    assert_like_ours(settings, reference=tiny_model(seed=1))


def test_all_weights_learn_as_ours_and_the_optimiser_goes_on() -> None:
    """Two rounds, the second with the moments of the first."""
    settings = RefinementSettings(
        train="full", optimizer="continue", beta=0.3, learning_rate=1e-3, epochs=2, pairs_a_step=2
    )
    ours, theirs = tiny_model(), tiny_model()
    moments, their_moments = None, None
    for _ in range(2):
        moments = refine(ours, STEPS, consult(ours, STEPS, settings), settings, moments=moments).moments
        before = copy.deepcopy(theirs)
        found = refine_with_trl(theirs, before, tiny_tokenizer(), STEPS, settings, moments=their_moments)
        their_moments = found.moments
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(name), weight, atol=2e-4, rtol=1e-2)
    assert moments is not None
    assert their_moments is not None
    for name, moment in moments.items():
        torch.testing.assert_close(their_moments[name], moment, atol=1e-4, rtol=2e-2)


def test_gradients_of_smaller_passes_add_up_to_those_of_a_step() -> None:
    settings = RefinementSettings(beta=0.3, learning_rate=1e-3, epochs=3, pairs_a_step=2)
    whole, expected = with_trl(settings)
    parts, found = with_trl(settings, pairs_a_pass=1)
    for one, other in zip(expected.losses, found.losses, strict=True):
        assert other.dpo == pytest.approx(one.dpo, abs=1e-4)
        assert other.margin == pytest.approx(one.margin, abs=1e-3)
    weights = dict(whole.named_parameters())
    for name, weight in parts.named_parameters():
        torch.testing.assert_close(weight, weights[name], atol=2e-4, rtol=1e-2)


def test_a_round_that_has_saturated_ends() -> None:
    settings = RefinementSettings(beta=0.5, learning_rate=2e-2, epochs=10, pairs_a_step=2, stop_margin=1.0)
    ticks: list[int] = []
    _, done = with_trl(settings, tick=ticks.append)
    assert done.stopped is not None
    assert ticks == list(range(1, done.stopped + 1))
    assert done.stopped < 20


def test_global_random_streams_and_the_users_screen_are_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    model = adapted()
    random.seed(5)
    torch.manual_seed(5)
    refine_with_trl(model, None, tiny_tokenizer(), STEPS, RefinementSettings(pairs_a_step=2))
    assert (random.random(), torch.rand(1)) == expected
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"lower refinement\.learning_rate"):
        refine_with_trl(model, None, tiny_tokenizer(), STEPS, RefinementSettings(pairs_a_step=2))
