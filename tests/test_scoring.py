import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from selfdev.errors import UserError
from selfdev.evaluation.objective import Objective, mean_by_group
from selfdev.evaluation.scoring import ScoringError, encode, score_exact
from selfdev.evaluation.tasks import Question, load_task
from selfdev.zoo import zoo_models


class Bigram(nn.Module):
    """A language model whose next token depends on the present one alone, by a table given as text."""

    def __init__(self, tokenizer, table):
        super().__init__()
        ids = tokenizer.get_vocab()
        weight = torch.zeros(len(tokenizer), len(tokenizer))
        for present, following in table.items():
            weight[ids[following], ids[present]] = 1.0
        self.head = nn.Linear(len(tokenizer), len(tokenizer), bias=False)
        self.head.weight.data = weight
        self.device = torch.device("cpu")

    def base_model(self, input_ids, use_cache):
        size = self.head.in_features
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, size).float())

    def get_output_embeddings(self):
        return self.head


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo_models("nano")["seed"])


def score(tokenizer, table, *pairs):
    questions = [Question("add", prompt, answer) for prompt, answer in pairs]
    return score_exact(Bigram(tokenizer, table), encode(tokenizer, questions)).tolist()


def test_right_means_every_token_and_the_end(tokenizer):
    table = {"=": "3", "3": "4", "4": "<eos>"}
    asked = [("1+2=", "34"), ("10+20=", "34"), ("1+2=", "3"), ("1+2=", "4"), ("1+2=", "344")]
    assert score(tokenizer, table, *asked) == [True, True, False, False, False]


def test_an_answer_that_does_not_stop_is_wrong(tokenizer):
    assert score(tokenizer, {"=": "3", "3": "3"}, ("1+2=", "3")) == [False]
    assert score(tokenizer, {"=": "3", "3": "<eos>"}, ("1+2=", "3")) == [True]


def test_an_answer_that_stops_early_is_wrong(tokenizer):
    assert score(tokenizer, {"=": "<eos>", "3": "<eos>"}, ("1+2=", "3")) == [False]


def test_logits_that_are_not_finite_are_a_failure_and_no_score(tokenizer):
    model = Bigram(tokenizer, {"=": "3", "3": "<eos>"})
    encoded = encode(tokenizer, [Question("add", "1+2=", "3")])
    for broken in (math.nan, math.inf):
        model.head.weight.data[5, 5] = broken
        with pytest.raises(ScoringError, match="not finite"):
            score_exact(model, encoded)


@pytest.mark.parametrize("name", ["seed", "add"])
def test_one_pass_equals_greedy_generation(name):
    """On 240 questions of all groups, where the models are right on some and wrong on others."""
    found = zoo_models("nano")
    path = {"seed": found["seed"], **found["experts"]}[name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    questions = load_task("nano").development(240, order_seed=3)

    prompts = tokenizer([question.prompt for question in questions], return_tensors="pt", padding=True)
    longest = max(len(question.answer) for question in questions)
    written = model.generate(**prompts, max_new_tokens=longest + 1, do_sample=False)
    end = tokenizer.eos_token
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :])
    generated = [
        text.startswith(question.answer + end) for text, question in zip(texts, questions, strict=True)
    ]

    right = score_exact(model, encode(tokenizer, questions))
    assert right.dtype == torch.bool
    assert right.tolist() == generated
    assert 50 < sum(generated) < 230


@settings(max_examples=20, deadline=None)
@given(data=st.data(), batch_tokens=st.integers(1, 400))
def test_a_verdict_depends_on_its_question_alone(data, batch_tokens):
    """Order and batch size change nothing."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_models("nano")["seed"])
    model = Bigram(tokenizer, {"=": "1", "1": "2", "2": "<eos>"})
    pool = [("1+2=", "12"), ("99+99=", "12"), ("r1=", "1"), ("s12345=", "12345"), ("m1,2,3=", "12")]
    expected = dict(zip(pool, [True, True, False, False, True], strict=True))
    drawn = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=40))
    questions = [Question("any", *pair) for pair in drawn]
    right = score_exact(model, encode(tokenizer, questions, batch_tokens=batch_tokens))
    assert right.tolist() == [expected[pair] for pair in drawn]


def test_batches_keep_to_their_size(tokenizer):
    questions = load_task("nano").development(300, order_seed=0)
    encoded = encode(tokenizer, questions, batch_tokens=256)
    assert all(batch.input_ids.numel() <= 256 for batch in encoded.batches)
    seen = torch.cat([batch.questions for batch in encoded.batches])
    assert sorted(seen.tolist()) == list(range(300))


def test_a_tokenizer_with_two_ways_to_write_an_answer_is_refused():
    tokens = {"<eos>": 0, "=": 1, "1": 2, "2": 3, "12": 4}
    inner = Tokenizer(models.BPE(tokens, [("1", "2")]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert encode(tokenizer, [Question("any", "1=", "21")]).count == 1
    with pytest.raises(UserError, match="answer '12' can be written in 2 ways"):
        encode(tokenizer, [Question("any", "1=", "12")])


def test_what_cannot_be_encoded_is_refused(tokenizer):
    with pytest.raises(UserError, match="does not know"):
        encode(tokenizer, [Question("any", "1 plus 2=", "3!")])
    with pytest.raises(UserError, match="no question"):
        encode(tokenizer, [])
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(endless, [Question("any", "1=", "1")])


def test_a_score_is_the_mean_over_groups():
    groups, right = ["add", "rev", "add", "add", "add"], [True, True, False, False, False]
    assert mean_by_group(groups, right) == {"add": 0.25, "rev": 1.0}
    assert Objective().score(groups, right) == 0.625  # and not 2 of 5 questions


def test_mean_by_group_wants_one_verdict_for_each_question():
    with pytest.raises(ValueError, match="zip"):
        mean_by_group(["add"], [True, False])
