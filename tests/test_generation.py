"""Greedy decoding with a shared prefix against transformers' own, and the likelihood of solutions."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from byte_model import byte_model, byte_tokenizer
from selfdev.errors import UserError
from selfdev.evaluation import tasks
from selfdev.evaluation.scoring import (
    ScoringError,
    continuations,
    encode,
    generate,
    loglikelihood,
    prepare,
    score_exact,
)
from selfdev.evaluation.tasks import Question, load_task, task_names
from selfdev.evaluation.tasks.checkers import Exact
from selfdev.evaluation.tasks.declaration import TaskFile
from selfdev.evaluation.tasks.grading import Grading, Way
from selfdev.models.folder import load_model, load_tokenizer
from selfdev.zoo import zoo_models

EXAMPLES = "Question: What is 2 + 2?\nAnswer: 4\n\nQuestion: What is 3 + 5?\nAnswer: 8\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return byte_model()


def asked(*prompts, context="", answer="4", solution=" 4"):
    return [Question("any", prompt, answer, context, solution) for prompt in prompts]


def written_by_transformers(model, tokenizer, text, new_tokens):
    ids = tokenizer([text], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def texts(model, tokenizer, questions, grading):
    return [reply.text for reply in prepare(model, tokenizer, questions, grading)(model).replies]


def test_free_places_are_taken_by_the_next_questions(model, tokenizer, monkeypatch):
    """Texts of many lengths, three places, prompts read in pieces: each text is still the model's own."""
    monkeypatch.setattr(generate, "ROWS", 3)
    monkeypatch.setattr(continuations, "QUERIES", 4)
    questions = asked(*("abcdefghij"[n] * (1 + 5 * n) for n in range(10)), context=EXAMPLES)
    free = [written_by_transformers(model, tokenizer, q.text, 16) for q in questions]
    stop = tuple(next(c for c in text[2 * n + 2 :] if c.isascii()) for n, text in enumerate(free[:3]))
    grading = Grading(Way.GENERATE, stop, max_new_tokens=16)
    found = texts(model, tokenizer, questions, grading)
    assert found == [grading.cut(text) for text in free]
    assert len({len(text) for text in found}) > 3


def test_a_model_whose_attention_does_more_is_refused(tokenizer):
    config = Gemma2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=0,
    )
    capped = Gemma2ForCausalLM(config).eval()
    with pytest.raises(UserError, match="caps its scores"):  # before any question is asked
        prepare(capped, tokenizer, asked("one"), Grading(Way.GENERATE, max_new_tokens=3))


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    context=st.sampled_from(["", EXAMPLES]),
    limit=st.sampled_from([(64, 24_576, 2048), (2, 24_576, 7), (3, 60, 16)]),
)
def test_the_texts_are_those_of_transformers(lengths, context, limit):
    """Whatever the lengths, the batches, the chunks in which prompts are read, and the common beginning."""
    tokenizer, model = byte_tokenizer(), byte_model()
    questions = asked(*(chr(97 + i) + "x?" * n for i, n in enumerate(lengths)), context=context)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("ROWS", "CACHE_TOKENS", "READ_TOKENS"), limit, strict=True):
            patch.setattr(generate, name, value)
        found = texts(model, tokenizer, questions, Grading(Way.GENERATE, max_new_tokens=6))
    assert found == [written_by_transformers(model, tokenizer, q.text, 6) for q in questions]


def test_a_text_ends_before_the_first_stop_string(model, tokenizer):
    questions = asked("one", "two", "three", "four")
    whole = texts(model, tokenizer, questions, Grading(Way.GENERATE, max_new_tokens=40))
    stop = tuple(text[12:14] for text in whole[:2])
    assert all(stop)
    cut = texts(model, tokenizer, questions, Grading(Way.GENERATE, stop, max_new_tokens=40))
    for text, short in zip(whole, cut, strict=True):
        places = [text.find(each) for each in stop if each in text]
        assert short == text[: min(places, default=len(text))]
    assert len(cut[0]) <= 12


def test_the_end_token_ends_a_text_and_is_no_part_of_it(tokenizer):
    """Whether it comes from the tokenizer or from the generation config."""
    model = byte_model()
    [text] = texts(model, tokenizer, asked("one"), Grading(Way.GENERATE, max_new_tokens=30))
    tokens = tokenizer(text)["input_ids"]
    model.generation_config.eos_token_id = [0, tokens[7]]
    [short] = texts(model, tokenizer, asked("one"), Grading(Way.GENERATE, max_new_tokens=30))
    assert short == tokenizer.decode(tokens[: tokens.index(tokens[7])])


def test_what_does_not_fit_the_context_is_refused_with_its_place(tokenizer):
    model = byte_model(context=64)
    question = replace(asked("x" * 60)[0], where="mine.jsonl:7")
    with pytest.raises(
        UserError, match=r"mine.jsonl:7: prompt and answer need 60 \+ 5 tokens, and .* has 64"
    ):
        prepare(model, tokenizer, [question], Grading(Way.GENERATE, max_new_tokens=5))
    prepare(model, tokenizer, [question], Grading(Way.GENERATE, max_new_tokens=4))
    with pytest.raises(UserError, match="context has 64"):
        prepare(model, tokenizer, asked("x" * 63), Grading(Way.LOGLIKELIHOOD))


SMALL = {"vocab_size": 300, "hidden_size": 32, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("way", [Way.GENERATE, Way.LOGLIKELIHOOD])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BloomForCausalLM, BloomConfig(n_layer=2, n_head=4, initializer_range=0.3, **SMALL)),
        (
            FalconForCausalLM,
            FalconConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **SMALL),
        ),
        (
            GPTNeoForCausalLM,
            GPTNeoConfig(
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                initializer_range=0.3,
                **SMALL,
            ),
        ),
        (MambaForCausalLM, MambaConfig(num_hidden_layers=2, **SMALL)),
    ],
)
def test_a_model_that_would_not_see_the_common_beginning_is_refused(tokenizer, way, kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with pytest.raises(UserError, match=rf"a {kind.__name__} .*cannot be scored by 'generate'.*by 'exact'"):
        prepare(model, tokenizer, asked("one"), Grading(way))


@pytest.mark.parametrize("way", [Way.GENERATE, Way.LOGLIKELIHOOD])
def test_a_model_that_emits_no_number_fails_and_scores_nothing(tokenizer, way):
    model = byte_model()
    model.model.norm.weight.data[3] = math.nan
    scoring = prepare(model, tokenizer, asked("one", "two"), Grading(way))
    with pytest.raises(ScoringError, match="not finite"):
        scoring(model)


def test_one_preparation_scores_many_models(tokenizer):
    questions = asked("one", "two", context=EXAMPLES)
    scoring = prepare(byte_model(), tokenizer, questions, Grading(Way.GENERATE, max_new_tokens=12))
    for seed in (1, 2):
        other = byte_model(seed)
        assert [reply.text for reply in scoring(other).replies] == [
            written_by_transformers(other, tokenizer, q.text, 12) for q in questions
        ]


@settings(max_examples=6, deadline=None)
@given(data=st.data(), context=st.sampled_from(["", EXAMPLES]), most=st.sampled_from([8, 90, 2048]))
def test_likelihood_is_the_mean_log_probability_of_the_solution(data, context, most):
    tokenizer, model = byte_tokenizer(), byte_model()
    lengths = st.tuples(st.integers(1, 30), st.integers(1, 20))
    drawn = data.draw(st.lists(lengths, min_size=1, max_size=6))
    questions = [
        Question("any", chr(97 + i) * p, "-", context, "+" * (s - 1) + "." * (i % 2) + "!")
        for i, (p, s) in enumerate(drawn)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loglikelihood, "BATCH_TOKENS", most)
        found = prepare(model, tokenizer, questions, Grading(Way.LOGLIKELIHOOD))(model).outcomes
    for question, nats in zip(questions, found.tolist(), strict=True):
        prompt = len(tokenizer(question.text)["input_ids"])
        ids = torch.tensor(tokenizer([question.text + question.gold])["input_ids"])
        log_probs = model(ids).logits[0].log_softmax(-1)
        each = log_probs[prompt - 1 : -1].gather(1, ids[0, prompt:, None])
        assert nats == pytest.approx(each.mean().item(), abs=1e-4)
        assert nats < 0


@pytest.mark.parametrize("name", ["seed", "max"])
def test_exact_equals_generation_on_the_nano_task(name):
    found = zoo_models("nano")
    folder = {"seed": found["seed"], **found["experts"]}[name]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    task = load_task("nano")
    questions = task.development(360, order_seed=2)
    exact = prepare(model, tokenizer, questions, task.grading)(model).outcomes
    generated = prepare(model, tokenizer, questions, replace(task.grading, way=Way.GENERATE))(model).outcomes
    assert exact.dtype == generated.dtype == torch.bool
    assert exact.tolist() == generated.tolist()
    assert 100 < exact.sum() < 330


WRITTEN_IN_ONE_WAY = ("dates", "nano", "nano2", "strings", "units", "word_problems")
"""The built-in tasks whose answers are what a model writes, whole, up to one end: `exact` can promise to equal it."""


@pytest.mark.parametrize("name", WRITTEN_IN_ONE_WAY)
def test_exact_equals_generation_on_built_in_tasks(name):
    """A model of bytes that has learned the answers to some questions by heart."""
    tokenizer, task = byte_tokenizer(), load_task(name)
    # Without the examples, and the prompts' ends alone: a model of two layers learns short texts in a moment.
    drawn = task.development(6, order_seed=0)
    questions = [replace(question, context="", prompt=question.prompt[-24:]) for question in drawn]
    end = task.grading.stop[0] if task.grading.stop else tokenizer.eos_token
    model = learned(tokenizer, [q.text + q.gold + end for q in questions[:3]])
    exact, generated = (replace(task.grading, way=way) for way in (Way.EXACT, Way.GENERATE))
    outcomes = prepare(model, tokenizer, questions, exact)(model).outcomes.tolist()
    scored = prepare(model, tokenizer, questions, generated)(model)
    verbatim = [
        reply.text == question.gold for reply, question in zip(scored.replies, questions, strict=True)
    ]
    assert outcomes == verbatim == scored.outcomes.tolist()
    assert outcomes[:3] == [True] * 3
    assert not all(outcomes)


def test_exact_is_refused_for_every_other_built_in_task():
    """They read an answer out of a solution, which can be written in many ways."""
    declared = Path(tasks.__file__).parent / "declared"
    others = set(task_names()) - set(WRITTEN_IN_ONE_WAY)
    assert others == {file.stem for file in declared.glob("*.yaml")} == {"gsm8k", "gsm8k_fixed", "math"}
    for name in others:
        grading = TaskFile(declared / f"{name}.yaml").declaration.grading()
        assert grading.way is Way.GENERATE
        with pytest.raises(UserError, match="takes no extraction and no checker"):
            replace(grading, way=Way.EXACT)


def learned(tokenizer, passages):
    model = byte_model(context=256)
    ids = tokenizer(passages, return_tensors="pt", padding=True)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for _ in range(300):
        loss = model(**ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    return model.eval()


def test_exact_scores_a_stop_string_as_the_end():
    """A stop string of one character ends an answer as the end token does, also inside a longer token."""
    tokenizer, model = byte_tokenizer(), byte_model()
    question = Question("any", "one", "?", solution="")
    [text] = texts(model, tokenizer, [question], Grading(Way.GENERATE, max_new_tokens=2))
    first, second = text[0], text[1]
    question = Question("any", "one", first)
    ended, endless = (
        prepare(model, tokenizer, [question], Grading(Way.EXACT, stop))(model).outcomes.tolist()
        for stop in ((second,), ())
    )
    assert (ended, endless) == ([True], [False])


def test_exact_refuses_what_it_cannot_promise():
    with pytest.raises(UserError, match="takes no extraction"):
        Grading(Way.EXACT, checker=Exact(ignore_case=True))
    with pytest.raises(UserError, match="stop strings of one character"):
        Grading(Way.EXACT, stop=("\n\n",))


def test_score_exact_is_what_prepare_gives_for_exact():
    found = zoo_models("nano")["seed"]
    model, tokenizer = load_model(found), load_tokenizer(found)
    task = load_task("nano")
    questions = task.development(24, 0)
    both = prepare(model, tokenizer, questions, task.grading)(model).outcomes
    assert torch.equal(both, score_exact(model, encode(tokenizer, questions)))
