import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfdev.factory.packing import completion_log_probs
from selfdev.factory.refinement import Diverged, Preference, Step, dpo_loss, plan, refine
from tiny import tiny_model

PROMPT = (1, 2, 3, 4, 5)
COMPLETIONS = ((6, 7, 8), (9,), (10, 11, 12, 13), (6, 7, 9))


def adapted(seed: int = 0) -> object:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def test_packed_log_probs_are_those_of_separate_passes() -> None:
    model = tiny_model()
    packed = completion_log_probs(model, PROMPT, COMPLETIONS)
    for completion, found in zip(COMPLETIONS, packed, strict=True):
        ids = torch.tensor([[*PROMPT, *completion]])
        log_probs = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_packed_log_probs_is_that_of_plain_logits() -> None:
    model = adapted()
    loss = torch.stack([part.sum() for part in completion_log_probs(model, PROMPT, COMPLETIONS)]).pow(2).sum()
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = []
    for completion in COMPLETIONS:
        ids = torch.tensor([[*PROMPT, *completion]])
        log_probs = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        plain.append(log_probs.gather(-1, torch.tensor(completion)[:, None]).sum())
    torch.stack(plain).pow(2).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(packed[name], expected[name], atol=1e-3, rtol=1e-3)


def test_dpo_loss_by_hand() -> None:
    gain = torch.tensor([1.0, -1.0, 0.0])
    loss, margin = dpo_loss(gain, torch.tensor([[0, 1], [2, 0]]), beta=0.5)
    # margins 2 and -1; -log sigmoid(1) and -log sigmoid(-0.5)
    assert margin.item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 2)


def test_before_training_the_loss_is_log_2() -> None:
    zero, _ = dpo_loss(torch.zeros(2), torch.tensor([[0, 1]]), beta=0.1)
    assert zero.item() == pytest.approx(math.log(2))


A, B = (7,), (8,)
PREFERENCES = [
    Preference(A, (1,), (2,)),
    Preference(A, (1,), (3,)),
    Preference(B, (4,), (2,)),
    Preference(A, (5,), (2,)),
]


def test_a_step_shares_one_prompt_and_computes_a_program_once() -> None:
    steps = plan(PREFERENCES, pairs_a_step=2, seed=0)
    assert sorted((step.prompt, len(step.pairs)) for step in steps) == [(A, 1), (A, 2), (B, 1)]
    rebuilt = [
        Preference(step.prompt, step.completions[a], step.completions[b])
        for step in steps
        for a, b in step.pairs
    ]
    assert sorted(map(repr, rebuilt)) == sorted(map(repr, PREFERENCES))
    assert all(len(set(step.completions)) == len(step.completions) for step in steps)
    assert plan(PREFERENCES, 2, seed=0) == steps != plan(PREFERENCES, 2, seed=1)


def test_rehearsed_programs_are_imitated_and_in_no_pair() -> None:
    known = {A: [(10,), (11,), (12,)], B: [(20,)]}
    steps = plan(PREFERENCES, pairs_a_step=2, seed=0, rehearsal=1, known=known)
    rehearsed = [(step.prompt, step.completions[i]) for step in steps for i in step.rehearsed]
    assert all(completion in known[prompt] for prompt, completion in rehearsed)
    assert len({each for each in rehearsed if each[0] == A}) == 2  # dealt as cards: none twice
    for step in steps:
        chosen = {c for c, _ in step.pairs}
        assert step.imitated == sorted(chosen | set(step.rehearsed))
        assert not set(step.rehearsed) & {i for pair in step.pairs for i in pair}


def test_refining_raises_the_chosen_above_the_rejected_and_repeats_itself() -> None:
    steps = [Step(PROMPT, COMPLETIONS[:2], ((0, 1),)), Step(PROMPT, COMPLETIONS[2:], ((0, 1),))]
    weights = []
    for _ in range(2):
        model = adapted()
        with torch.no_grad():
            before = [part.sum() for part in completion_log_probs(model, PROMPT, COMPLETIONS)]
        losses = refine(model, steps, beta=0.5, learning_rate=5e-3, epochs=6, supervised=0.1)
        with torch.no_grad():
            after = [part.sum() for part in completion_log_probs(model, PROMPT, COMPLETIONS)]
        gains = [a - b for a, b in zip(after, before, strict=True)]
        assert gains[0] > gains[1]
        assert gains[2] > gains[3]
        assert losses[0].dpo > losses[-1].dpo
        assert losses[-1].margin > 1
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"lower refinement\.learning_rate"):
        refine(
            model,
            [Step(PROMPT, COMPLETIONS, ((0, 1),))],
            beta=0.1,
            learning_rate=1e-3,
            epochs=1,
            supervised=0,
        )
