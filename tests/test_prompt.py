from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byte_model import byte_model, byte_tokenizer
from scripted import scripted_config
from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import OPENING, Form, wrap_short
from selfdev.factory.factory import LocalFactory
from selfdev.factory.prompt import STOP, ask, base_of, correcting, deal, prompts_of, showing
from selfdev.settings import PromptSettings


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
def test_examples_are_dealt_as_cards(prompts: int, shown: int, seed: int) -> None:
    sources = dict.fromkeys("abcdefghijkl", "")
    hands = deal(sources, prompts, shown, seed)
    assert [len(set(hand)) for hand in hands] == [shown] * prompts
    uses = Counter(name for hand in hands for name in hand)
    assert max(uses.values()) - min(uses.get(name, 0) for name in sources) <= 2
    assert deal(sources, prompts, shown, seed) == hands


def test_a_short_prompt_shows_its_examples_and_opens_a_function() -> None:
    prompt = ask(("median", "vote"), examples(), Form.SHORT)
    assert prompt.text.index("def merge_median") < prompt.text.index("def merge_vote")
    assert prompt.text.endswith("\n\n" + OPENING)
    assert prompt.examples == ("median", "vote")


def test_a_contract_prompt_names_the_signature_and_holds_a_worked_example() -> None:
    prompt = ask(("inverse_distance",), examples(), Form.CONTRACT)
    assert prompt.text.count("def merge_models(model_dict, device):") == 2
    assert "merge_inverse_distance" in prompt.text


def test_a_short_program_stops_at_its_end_and_not_at_an_empty_line_within() -> None:
    stop = STOP[Form.SHORT]
    assert stop.search("return x\n\n\n")
    assert stop.search("return x\n\ndef")
    assert stop.search("return x\n\nprint(x)")
    assert not stop.search("x = 1\n\n")
    assert not stop.search("x = 1\n\n    y")


def test_an_answer_stops_at_the_end_of_its_code_block_and_not_at_its_beginning() -> None:
    stop = STOP[Form.CONTRACT]
    assert not stop.search("Here is one:\n\n```")
    assert not stop.search("Here is one:\n\n```python\ndef merge_models(model_dict, device):\n    x = 1\n")
    assert stop.search("Here is one:\n\n```python\ndef merge_models(model_dict, device):\n    return 1\n```")


@pytest.mark.parametrize("form", list(Form))
def test_a_prompt_shows_a_program_in_the_place_of_its_last_example(form: Form) -> None:
    prompts = [ask(("vote", "row_top"), examples(), form), ask(("row_top", "vote"), examples(), form)]
    program = wrap_short("def merge_mine(deltas):\n    return deltas.abs().sum(dim=0)\n")
    shown = showing(prompts, {"learning/1/007": program}, examples())
    for before, after, kept in zip(prompts, shown, ("vote", "row_top"), strict=True):
        assert after.examples == (kept, "learning/1/007")
        assert "return deltas.abs().sum(dim=0)" in after.text
        assert after.text.endswith(before.text[-10:])
        assert after.form is form
    assert showing(prompts, {}, examples()) == prompts
    whole = "import torch\n\ndef merge_models(model_dict, device):\n    return 1 * model_dict['a']\n"
    if form is Form.CONTRACT:
        assert whole in showing(prompts, {"x": whole}, examples())[0].text


@pytest.mark.parametrize("form", list(Form))
def test_what_fails_is_shown_under_its_own_prompt_with_one_line_of_its_error(form: Form) -> None:
    prompt = ask(("vote",), examples(), form)
    program = wrap_short("def merge_mine(deltas):\n    return deltas['{x}']\n")
    turn = correcting(prompt, program, "on probe 'wide 4':\n\ntoo " + "many indices " * 40)
    assert turn.text.startswith(prompt.text)
    assert (turn.examples, turn.form) == (prompt.examples, form)
    [line] = [line for line in turn.text.splitlines() if "on probe" in line]
    assert "on probe 'wide 4': too many indices many" in line
    assert len(line.partition(": ")[2]) == 200
    if form is Form.SHORT:
        asked = turn.text.removeprefix(prompt.text)
        assert asked.startswith("mine(deltas):\n    return deltas['{x}']\n\n\n# It fails: ")
        assert asked.endswith(f"\n# Corrected:\n{OPENING}")
    else:
        assert f"```python\n{program}```\n" in turn.text
        assert turn.text.endswith("Write it corrected, as one Python code block.\n")


def test_a_turns_prompt_goes_back_to_the_usual_one() -> None:
    usual = [ask((name,), examples(), Form.SHORT) for name in ("vote", "row_top")]
    program = wrap_short("def merge_mine(deltas):\n    return 0\n")
    texts = [prompt.text for prompt in (*usual, correcting(usual[1], program, "no tensor"))]
    assert [base_of(text, texts) for text in texts] == [0, 1, 1]


TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_few_programs_have_as_many_prompts() -> None:
    drawn = PromptSettings(form=Form.SHORT, examples="drawn", prompts=14, shown=3)
    assert [len(prompts_of(drawn, examples(), 0, 0, programs)) for programs in (3, 14, 56)] == [3, 14, 14]


def test_a_message_is_asked_in_the_chat_template_where_there_is_one() -> None:
    plain, chatty = byte_tokenizer(), byte_tokenizer()
    chatty.chat_template = TEMPLATE
    contract, short = (ask(("vote",), examples(), form) for form in (Form.CONTRACT, Form.SHORT))
    assert plain.decode(contract.tokens(plain)) == contract.text
    assert chatty.decode(contract.tokens(chatty)) == f"[user]{contract.text}[end][assistant]"
    thinking = PromptSettings(names=("vote",), template={"enable_thinking": False})
    chatty.chat_template = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
    [told] = prompts_of(thinking, examples(), 0, 0, 8)
    assert chatty.decode(told.tokens(chatty)) == f"[user]{contract.text}[end][assistant]<think></think>"
    [shown] = showing([told], {"a": wrap_short(examples()["clipped"])}, examples())
    assert chatty.decode(shown.tokens(chatty)).endswith("[assistant]<think></think>")
    # The short form is a text to be continued, template or not.
    assert short.tokens(plain) == short.tokens(chatty) == plain(short.text).input_ids


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_an_answer_is_sampled_under_the_message_that_asks_for_it(
    template: str | None, tmp_path: Path
) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    factory = LocalFactory(
        scripted_config(
            programs=3,
            factory={"model": str(tmp_path / "model"), "max_new_tokens": 16},
            prompt={"form": "contract", "names": ["vote"]},
        )
    )
    [prompt] = factory.prompts(0)
    asked = prompt.text if template is None else f"[user]{prompt.text}[end][assistant]"
    begin = tokenizer(asked).input_ids
    written = factory.write([(number, prompt) for number in range(3)], 0, 1.0, [], lambda *_: None)
    assert len({sample.tokens for sample in written}) == 3
    for sample in written:
        ids = torch.tensor([[*begin, *sample.tokens]])
        log_probs = model(ids).logits[0, len(begin) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, ids[0, len(begin) :, None]).sum().item()
        assert sample.log_prob == pytest.approx(expected, abs=2e-3)
        assert sample.finished == (sample.tokens[-1] == 0)
