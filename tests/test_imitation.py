"""Supervised training on programs."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from selfdev.factory.imitation import Lesson, imitate, lessons
from selfdev.factory.packing import completion_log_probs
from selfdev.factory.refinement import Diverged
from tiny import tiny_model

PROMPT = (1, 2, 3, 4, 5)


def adapted() -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def likelihood(model: PeftModel, completion: tuple[int, ...]) -> float:
    with torch.no_grad():
        return completion_log_probs(model, PROMPT, [completion])[0].sum().item()


def test_what_is_imitated_becomes_likely() -> None:
    model, good, other = adapted(), (6, 7, 8), (9, 10, 11)
    before = likelihood(model, good), likelihood(model, other)
    losses = imitate(model, [Lesson(PROMPT, (good,))] * 12, 1e-2)
    assert losses[0] == pytest.approx(-before[0] / 3, rel=1e-5)  # nats a token
    assert losses[-1] < losses[0] - 1
    assert likelihood(model, good) > before[0] + 3
    assert likelihood(model, other) < likelihood(model, good)


def test_a_step_that_takes_several_passes_is_the_same_step() -> None:
    steps = [Lesson(PROMPT, ((6, 7, 8), (9, 10), (11, 12, 13, 14))), Lesson(PROMPT, ((7, 9),))]
    whole, split = adapted(), adapted()
    losses = imitate(whole, steps, 1e-2)
    assert imitate(split, steps, 1e-2, tokens_a_pass=len(PROMPT) + 5) == pytest.approx(losses, rel=1e-5)
    for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


def test_a_rate_that_is_too_high_is_told() -> None:
    with pytest.raises(Diverged, match=r"the loss.*lower refinement\.imitation\.learning_rate \(1e\+30\)"):
        imitate(adapted(), [Lesson(PROMPT, ((6, 7, 8),))] * 40, 1e30)


def test_weights_that_the_last_step_breaks_are_told() -> None:
    """Its loss is that of the weights before it."""
    with pytest.raises(Diverged, match=r"a weight.*lower factory\.warm_start\.learning_rate"):
        imitate(adapted(), [Lesson(PROMPT, ((6, 7, 8),))], 1e39, rate="factory.warm_start.learning_rate")


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2),
)
def test_every_program_comes_once_a_pass_under_its_own_prompt(
    drawn: list[tuple[int, int]], passes: int, together: int, rehearsal: int
) -> None:
    programs = [((prompt,), (prompt, program)) for prompt, program in drawn]
    known = {(prompt,): [(100, i) for i in range(4)] for prompt in range(3)}
    steps = lessons(programs, passes, together, 7, rehearsal, known)
    own = [(s.prompt, c) for s in steps for c in s.completions if c[0] != 100]
    assert Counter(own) == dict.fromkeys(programs, passes)
    for step in steps:
        rehearsed = [c for c in step.completions if c[0] == 100]
        assert len(rehearsed) == len(set(rehearsed)) == rehearsal
        assert 1 <= len(step.completions) - rehearsal <= together
    assert steps == lessons(programs, passes, together, 7, rehearsal, known)
