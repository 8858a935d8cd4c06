import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from selfdev.errors import SelfdevError
from selfdev.factory.adapter import load_moments, save_learned
from selfdev.factory.packing import completion_log_probs, completion_states, passes
from selfdev.factory.refinement import (
    Diverged,
    Outcome,
    Preference,
    Step,
    backward,
    consult,
    plan,
    refine,
    saturated,
)
from selfdev.settings import RefinementSettings
from tiny import tiny_model

PROMPT = (1, 2, 3, 4, 5)
COMPLETIONS = ((6, 7, 8), (9,), (10, 11, 12, 13), (6, 7, 9))


def adapted(seed: int = 0) -> PeftModel:
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


STEPS = [Step(PROMPT, COMPLETIONS[:2], ((0, 1),)), Step(PROMPT, COMPLETIONS[2:], ((0, 1),))]


def trained(
    steps: Sequence[Step] = STEPS, tokens_a_pass: int | None = None, flip_rate: float = 0.0, **settings: Any
) -> tuple[PeftModel, Outcome]:
    """A tiny model after a round."""
    chosen = RefinementSettings(**{"beta": 0.5, "learning_rate": 5e-3, "epochs": 6, **settings})
    model = adapted()
    references = consult(model, steps, chosen, tokens_a_pass)
    done = refine(model, steps, references, chosen, flip_rate=flip_rate, tokens_a_pass=tokens_a_pass)
    return model, done


def gains(model: PeftModel) -> list[float]:
    """How much more likely, in nats, each completion has become."""
    with torch.no_grad():
        after = [part.sum().item() for part in completion_log_probs(model, PROMPT, COMPLETIONS)]
        with model.disable_adapter():
            before = [part.sum().item() for part in completion_log_probs(model, PROMPT, COMPLETIONS)]
    return [a - b for a, b in zip(after, before, strict=True)]


def adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_refining_raises_the_chosen_above_the_rejected_and_repeats_itself() -> None:
    weights = []
    for _ in range(2):
        model, done = trained(supervised=0.1)
        gain = gains(model)
        assert gain[0] > gain[1]
        assert gain[2] > gain[3]
        assert done.losses[0].dpo > done.losses[-1].dpo
        assert done.losses[-1].margin > 1
        assert done.stopped is None
        weights.append(adapter(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust", "kto"])
def test_every_loss_raises_the_chosen_above_the_rejected(loss: str) -> None:
    model, done = trained(loss=loss, flip_rate=0.1)
    gain = gains(model)
    assert gain[0] > gain[1]
    assert gain[2] > gain[3]
    assert done.losses[0].dpo > done.losses[-1].dpo


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_kl_term_holds_the_model_to_its_reference(direction: str) -> None:
    free = trained(kl=1e-9, kl_direction=direction)[1].losses[-1]
    held = trained(kl=10.0, kl_direction=direction)[1].losses[-1]
    assert free.kl is not None
    assert held.kl is not None
    assert 0 < held.kl < free.kl / 2
    assert held.margin < free.margin
    assert trained()[1].losses[-1].kl is None


def test_the_direction_of_the_kl_term_is_the_one_that_was_asked_for() -> None:
    model = adapted()
    [reference] = consult(model, ONE, RefinementSettings(kl=0.2), None)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    found = {}
    for direction in ("forward", "reverse"):
        settings = RefinementSettings(kl=0.2, kl_direction=direction)
        found[direction] = backward(model, ONE[0], reference, settings, 0.0, None)[3].item()
    tokens, expected = 0, {"forward": 0.0, "reverse": 0.0}
    with torch.no_grad():
        for completion in ONE[0].completions:
            ids = torch.tensor([[*ONE[0].prompt, *completion]])
            mine = model(ids).logits[0, len(ONE[0].prompt) - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                first = model(ids).logits[0, len(ONE[0].prompt) - 1 : -1].log_softmax(-1)
            tokens += len(completion)
            expected["reverse"] += (mine.exp() * (mine - first)).sum().item()
            expected["forward"] += (first.exp() * (first - mine)).sum().item()
    assert abs(expected["forward"] - expected["reverse"]) > 1e-3 * expected["forward"]
    for direction, value in found.items():
        assert value == pytest.approx(expected[direction] / tokens, rel=1e-4)


ONE = [Step(PROMPT, COMPLETIONS, ((0, 1), (2, 3), (0, 3)), rehearsed=(1,))]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "kto"])
def test_passes_of_few_tokens_add_up_to_the_gradient_of_one(loss: str) -> None:
    """After one step of plain descent the weights tell the gradients apart; Adam's would only tell their signs."""
    settings = RefinementSettings(loss=loss, beta=0.5, supervised=0.3, kl=0.2)
    found = []
    for tokens_a_pass in (None, 10, 1):
        model = adapted()
        [reference] = consult(model, ONE, settings, tokens_a_pass)
        with torch.no_grad():  # away from the start, where model and reference are one
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        terms = backward(model, ONE[0], reference, settings, 0.1, tokens_a_pass)
        found.append((terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (terms, whole), *others = found
    assert terms[3] > 0
    for their_terms, split in others:
        torch.testing.assert_close(their_terms, terms, atol=1e-5, rtol=1e-5)
        assert split.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=1e-5)


def test_completions_are_shared_out_to_passes() -> None:
    assert passes(5, [3, 1, 4, 3], None) == [range(4)]
    assert passes(5, [3, 1, 4, 3], 16) == [range(4)]
    assert passes(5, [3, 1, 4, 3], 12) == [range(2), range(2, 4)]
    assert passes(5, [3, 1, 4, 3], 8) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert passes(5, [9, 1, 9], 8) == [range(1), range(1, 2), range(2, 3)]  # what is longer is alone


def test_a_round_ends_once_its_margin_is_enough() -> None:
    _, through = trained(epochs=10)
    _, done = trained(epochs=10, stop_margin=1.0)
    assert done.stopped is not None
    assert 4 <= done.stopped < 20
    assert len(done.losses) == math.ceil(done.stopped / 2) < len(through.losses)
    assert saturated([0, 1, 2, 3, 4], 2.4)
    assert not saturated([0, 1, 2, 3, 4], 2.5)  # 1, 2, 3, 4 are the last four
    assert not saturated([9, 9, 9], 1.0)
    assert not saturated([9] * 9, None)


def test_a_reference_of_its_own_is_what_the_gain_is_measured_from() -> None:
    """Held to a model that already prefers the chosen, the same model starts with a margin below 0."""
    teacher, _ = trained()
    settings = RefinementSettings(beta=0.5)
    other = consult(teacher.merge_and_unload(), STEPS, settings)
    model = adapted()
    done = refine(model, STEPS, other, settings)
    assert done.losses[0].margin < -0.5


def test_an_adapter_that_is_saved_is_loaded_by_peft(tmp_path: Path) -> None:
    model, _ = trained()
    save_learned(model, tmp_path / "adapter")
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    ids = torch.tensor([[*PROMPT, *COMPLETIONS[0]]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny_model()(ids).logits)


def test_the_reference_of_a_step_is_that_of_its_own_programs() -> None:
    """Whatever passes they were computed in, and wherever else they stand."""
    model, settings = tiny_model(), RefinementSettings(kl=0.1)
    others = (2, 9)
    steps = [*ONE, Step(others, COMPLETIONS[:1], ()), Step(PROMPT, COMPLETIONS[1::-1], ((0, 1),))]
    ticks: list[int] = []
    for tokens_a_pass in (None, 2):
        found = consult(model, steps, settings, tokens_a_pass, ticks.append)
        for step, reference in zip(steps, found, strict=True):
            alone = [completion_states(model, step.prompt, [each]) for each in step.completions]
            expected = [
                completion_log_probs(model, step.prompt, [each])[0].sum() for each in step.completions
            ]
            assert reference.hidden is not None
            torch.testing.assert_close(reference.hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reference.log_probs, torch.stack(expected), atol=1e-5, rtol=1e-5)
    # Five programs under two prompts, in two passes and, of at most eight tokens, in five.
    assert ticks == [2, 3, 0, 1, 1, 2, 3]


def whole_model() -> LlamaForCausalLM:
    """Its output layer is its embedding."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
            initializer_range=0.3,
        )
    ).eval()


FULL = RefinementSettings(
    train="full", optimizer="continue", beta=0.5, learning_rate=1e-2, supervised=0.3, epochs=2
)


def test_the_gradient_of_all_weights_is_that_of_plain_logits() -> None:
    model = whole_model()
    found = torch.cat(completion_log_probs(model, PROMPT, COMPLETIONS)).pow(2).sum()
    plain = []
    for completion in COMPLETIONS:
        log_probs = (
            model(torch.tensor([[*PROMPT, *completion]])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        )
        plain.append(log_probs.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    names, weights = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(torch.cat(plain).pow(2).sum(), weights)
    for name, its, theirs in zip(names, torch.autograd.grad(found, weights), expected, strict=True):
        torch.testing.assert_close(its, theirs, atol=1e-3, rtol=1e-3, msg=name)


def test_all_weights_learn_and_a_round_repeats_itself() -> None:
    weights = []
    for _ in range(2):
        model = whole_model()
        references = consult(model, STEPS, FULL)
        losses = refine(model, STEPS, references, FULL).losses
        assert losses[-1].dpo < losses[0].dpo
        [after, *_] = consult(model, STEPS, FULL)
        gain = after.log_probs - references[0].log_probs
        assert gain[0] > gain[1]
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][n], weight) for n, weight in whole_model().named_parameters())


def test_an_optimiser_that_goes_on_makes_two_rounds_one(tmp_path: Path) -> None:
    """Saved and read again in between; the rate follows each round's own schedule."""
    model = whole_model()
    moments = None
    for round_ in range(2):
        done = refine(model, STEPS, consult(model, STEPS, FULL), FULL, moments=moments)
        assert done.moments is not None
        save_learned(model, tmp_path / str(round_), done.moments)
        moments = load_moments(tmp_path / str(round_))
    unbroken, optimizer = whole_model(), None
    # A warm-up of one step, then down by a quarter of the peak: 4 steps a round.
    for _ in range(2):
        references = consult(unbroken, STEPS, FULL)
        optimizer = optimizer or torch.optim.AdamW(unbroken.parameters(), weight_decay=0.0)
        for place, share in enumerate((1.0, 0.75, 0.5, 0.25)):
            optimizer.param_groups[0]["lr"] = 1e-2 * share
            optimizer.zero_grad()
            backward(unbroken, STEPS[place % 2], references[place % 2], FULL, 0.0, None)
            torch.nn.utils.clip_grad_norm_(unbroken.parameters(), 1.0)
            optimizer.step()
    anew = whole_model()
    for _ in range(2):
        refine(anew, STEPS, consult(anew, STEPS, FULL), FULL)
    expected = dict(unbroken.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(weight, anew.get_parameter(name), atol=1e-4)


def test_no_moments_are_kept_that_nobody_would_read(tmp_path: Path) -> None:
    model, settings = whole_model(), FULL.model_copy(update={"optimizer": "fresh"})
    done = refine(model, STEPS, consult(model, STEPS, settings), settings)
    save_learned(model, tmp_path / "model", done.moments)
    assert done.moments is None
    with pytest.raises(SelfdevError, match=r"moments.safetensors', with which .* is not there; put it back"):
        load_moments(tmp_path / "model")
    assert not any(path.is_dir() for path in (tmp_path / "model").iterdir())


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("refit", ["fresh", "never"])
def test_moments_of_other_weights_are_refused(train: str, refit: str) -> None:
    with pytest.raises(ValidationError, match=r"refinement\.optimizer.*or optimizer: fresh"):
        RefinementSettings(optimizer="continue", train=train, refit=refit)  # type: ignore[arg-type]


def test_a_kl_term_needs_an_output_layer_that_stays() -> None:
    with pytest.raises(ValidationError, match=r"set refinement\.train: lora or refinement\.kl: 0"):
        RefinementSettings(train="full", kl=0.1)


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    model, settings = adapted(), RefinementSettings(beta=0.1, learning_rate=1e-3)
    steps = [Step(PROMPT, COMPLETIONS, ((0, 1),))]
    references = consult(model, steps, settings)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"lower refinement\.learning_rate"):
        refine(model, steps, references, settings)


def test_weights_that_are_not_finite_are_no_adapter() -> None:
    model, settings = adapted(), RefinementSettings(beta=0.1, learning_rate=1e-3)
    references = consult(model, STEPS[:1], settings)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda slope: slope * float("nan"))
    with pytest.raises(Diverged, match="a trained weight"):
        refine(model, STEPS[:1], references, settings)


@pytest.mark.parametrize(("field", "value"), [("loss", "kto"), ("kl", 0.1), ("rehearsal", 1)])
def test_what_trl_cannot_do_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"refinement\.{field}.*set refinement\.backend: own"):
        RefinementSettings(**{"backend": "trl", field: value})


def test_the_reference_follows_from_what_the_adapter_stands_on() -> None:
    assert RefinementSettings(refit="continue").held_to == "previous"
    assert RefinementSettings(refit="fresh").held_to == "first"
    assert RefinementSettings(refit="continue", reference="first").held_to == "first"
    assert RefinementSettings(refit="fresh", reference="previous").held_to == "previous"
