from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import OPENING, Form
from selfdev.factory.prompt import STOP, ask, deal


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
