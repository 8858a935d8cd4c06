import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from selfdev.errors import SelfdevError, UserError
from selfdev.factory import sampling
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
            expected = log_probs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            assert sample.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
            assert sample.log_prob == pytest.approx(expected.sum().item(), abs=1e-3)


def test_a_sample_depends_on_its_own_seed_and_not_on_its_neighbours_text() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    [first] = sampler()(model, tokenizer, PROMPTS[:1], [[11, 12, 13]])
    [second] = sampler()(model, tokenizer, PROMPTS[:1], [[11, 99, 13]])
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert first[1] != second[1]
    assert len({sample.tokens for sample in first}) == 3


def test_a_full_batch_writes_what_each_program_alone_would_be() -> None:
    """Places are taken over, columns go round, and prompts of two lengths mix in one batch."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    seeds = [list(range(9)), list(range(20, 27))]
    few = sampler(stop=re.compile("[0-4]"), batch=3)
    batched = few(model, tokenizer, PROMPTS, seeds)
    lengths = [len(sample.tokens) for group in batched for sample in group]
    assert len(set(lengths)) > 4  # they end at different times
    assert sum(lengths) > 3 * 12  # more than the columns hold without going round
    for prompt, group, its in zip(PROMPTS, batched, seeds, strict=True):
        for sample, seed in zip(group, its, strict=True):
            [[alone]] = few(model, tokenizer, [prompt], [[seed]])
            assert sample.tokens == alone.tokens
            assert sample.finished == alone.finished
            assert sample.log_prob == pytest.approx(alone.log_prob, abs=1e-4)


@pytest.mark.parametrize(
    "prompts",
    [
        [[9, 8, 7, *prompt] for prompt in PROMPTS],  # they begin alike
        # Some are those before them but for the end.
        [[*PROMPTS[0], *end] for end in ([5], [5, 6], [7], [], [8, 9, 3])] + [PROMPTS[1], PROMPTS[1], [9]],
    ],
)
def test_log_probs_in_a_full_batch_are_those_of_a_plain_forward_pass(prompts: list[list[int]]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    seeds = [list(range(10))] * len(prompts)
    groups = sampler(stop=re.compile("[0-4]"), batch=4)(model, tokenizer, prompts, seeds)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.tokens]])
            log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[0, len(prompt) :, None]).sum().item()
            assert sample.log_prob == pytest.approx(expected, abs=1e-3)


ANOTHER_PROCESS = """
import re
from selfdev.factory.sampling import Sampler
from tiny import tiny_model, tiny_tokenizer
samples = Sampler(1.0, 0.9, 12, re.compile("[0-4]"), batch=3)(
    tiny_model(), tiny_tokenizer(), [[1, 2, 3], [1, 4]], [list(range(7)), list(range(8))]
)
print([(s.tokens, s.log_prob) for group in samples for s in group])
"""


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
}
OLD_SIZES = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "eos_token_id": None}
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)), True),
    "gpt-neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), True),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**OLD_SIZES, n_embd=32, n_positions=64)), True),
    "gemma2": (
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5)
        ),
        True,
    ),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**OLD_SIZES, hidden_size=32)), False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_share_the_prompt_or_do_without(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, shares = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    seeds = [list(range(4))] * 2
    groups = sampler(stop=re.compile("[0-4]"), batch=3)(model, tiny_tokenizer(), PROMPTS, seeds)
    assert ("cannot share" in caplog.text) == (not shares)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.tokens]])
            log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[0, len(prompt) :, None]).sum().item()
            assert sample.log_prob == pytest.approx(expected, abs=1e-3)


def test_narrow_weights_share_the_prompt_too(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    wide = sampler(temperature=0.01, max_new_tokens=3)(model, tiny_tokenizer(), PROMPTS, [[0], [1]])
    narrow = sampler(temperature=0.01, max_new_tokens=3)(
        model.bfloat16(), tiny_tokenizer(), PROMPTS, [[0], [1]]
    )
    assert not caplog.text
    for [before], [after] in zip(wide, narrow, strict=True):
        assert after.tokens == before.tokens
        assert after.log_prob == pytest.approx(before.log_prob, abs=0.3)


def test_two_processes_write_the_same_to_the_last_bit() -> None:
    command = [sys.executable, "-c", ANOTHER_PROCESS]
    first, second = (
        subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second
    assert first.count("(") == 2 * 15


def test_progress_counts_programs_and_tokens() -> None:
    seen: list[tuple[int, int]] = []
    groups = sampler(batch=2)(
        tiny_model(), tiny_tokenizer(), PROMPTS, [[0, 1, 2], [3]], lambda *done: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (4, sum(len(sample.tokens) for group in groups for sample in group))


def test_the_seconds_of_a_program_are_those_from_its_first_token_to_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(1.0)  # goes on by a second with each token, whatever the machine does
    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    [samples] = sampler(batch=1)(tiny_model(), tiny_tokenizer(), PROMPTS[:1], [[0, 1, 2]])
    # One after the other: what those before it took does not count.
    assert [sample.seconds for sample in samples] == [len(sample.tokens) - 1 for sample in samples]
    assert sum(len(sample.tokens) for sample in samples) > 3


def test_a_space_before_a_word_is_not_lost_at_a_lines_end() -> None:
    """Tokenizers in the manner of SentencePiece drop it where they decode a word alone."""
    words = Tokenizer(WordLevel({"<unk>": 0, "\n": 1, "▁return": 2, "▁x": 3, "x": 4}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([2]) == "return"
    model = tiny_model(vocabulary=5)
    for sample in sampler(stop=re.compile(r"\n\S"))(model, tokenizer, [[1, 2]], [list(range(20))])[0]:
        assert sample.finished == bool(re.search(r"\n\S", tokenizer.decode([3, *sample.tokens])))


def test_broken_weights_are_refused() -> None:
    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(SelfdevError, match="logits are not finite"):
        sampler()(model, tiny_tokenizer(), PROMPTS, [[0], [1]])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    before = model.config._attn_implementation, model.lm_head
    sampler()(model, tiny_tokenizer(), PROMPTS, [[0], [1]])
    assert (model.config._attn_implementation, model.lm_head) == before


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
