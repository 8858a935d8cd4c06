import re

import pytest
import torch

from selfdev.errors import UserError
from selfdev.factory.sampling import Sampler
from tiny import tiny_model, tiny_tokenizer

NEVER = re.compile(r"(?!)")
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


def sampler(**changes: object) -> Sampler:
    return Sampler(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "stop": NEVER} | changes)  # type: ignore[arg-type]


def test_cold_sampling_writes_what_greedy_generate_writes() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    groups = sampler(temperature=1e-4)(model, tokenizer, PROMPTS, [[0, 1, 2], [3, 4]])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        greedy = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert [list(sample.tokens) for sample in group] == [greedy] * len(group)


def test_log_probs_are_those_of_a_plain_forward_pass() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for prompt, group in zip(PROMPTS, sampler()(model, tokenizer, PROMPTS, [[0, 1], [2, 3]]), strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.tokens]])
            log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[0, len(prompt) :, None]).sum().item()
            assert sample.log_prob == pytest.approx(expected, abs=1e-3)


def test_a_sample_depends_on_its_own_seed_and_not_on_its_neighbours_text() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    [first] = sampler()(model, tokenizer, PROMPTS[:1], [[11, 12, 13]])
    [second] = sampler()(model, tokenizer, PROMPTS[:1], [[11, 99, 13]])
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert first[1] != second[1]
    assert len({sample.tokens for sample in first}) == 3


def test_the_global_random_stream_is_left_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler()(model, tokenizer, PROMPTS, [[0], [1]])
    assert torch.equal(torch.rand(3), expected)


def test_frequencies_follow_the_model_and_top_p_cuts_the_tail() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    one = sampler(max_new_tokens=1)
    [group] = one(model, tokenizer, PROMPTS[:1], [list(range(4000))])
    probability = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    drawn = torch.bincount(torch.tensor([sample.tokens[0] for sample in group]), minlength=64) / 4000
    # Five standard errors of a share of 4,000.
    assert (drawn - probability).abs().max() < 5 * 0.5 / 4000**0.5
    best = int(probability.argmax().item())
    [group] = sampler(max_new_tokens=1, top_p=probability[best].item() * 0.9)(
        model, tokenizer, PROMPTS[:1], [[1, 2, 3]]
    )
    assert {sample.tokens for sample in group} == {(best,)}


def test_a_row_ends_at_the_stop_pattern_and_the_others_go_on() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    [free] = sampler()(model, tokenizer, PROMPTS[:1], [[1, 2, 3, 4]])
    digit = next(c for c in free[0].text if c.strip())
    [stopped] = sampler(stop=re.compile(re.escape(digit) + "$"))(
        model, tokenizer, PROMPTS[:1], [[1, 2, 3, 4]]
    )
    assert stopped[0].finished
    assert stopped[0].text == free[0].text[: free[0].text.index(digit) + 1]
    for before, after in zip(free, stopped, strict=True):
        if digit not in before.text:
            assert after.tokens == before.tokens


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="the model has 256"):
        sampler(max_new_tokens=252)(tiny_model(), tiny_tokenizer(), PROMPTS, [[0], [1]])
