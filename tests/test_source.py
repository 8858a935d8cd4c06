import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form, Unreadable, canonical, read_program, unwrap_short, wrap_short

SHORT = 'mean(deltas):\n    """Mean."""\n    return deltas.mean(dim=0)\n'


def test_a_short_program_is_wrapped_and_unwrapped() -> None:
    source = read_program(SHORT + "\n\ndef merge_next(deltas):\n    return 1", Form.SHORT)
    assert "merge_next" not in source
    assert source.endswith(
        "def merge_models(model_dict, device):\n    return merge_mean(torch.stack(list(model_dict.values())))\n"
    )
    assert unwrap_short(source) == "def merge_" + SHORT
    compile(source, "program", "exec")


def test_a_short_program_that_takes_the_contracts_name_still_has_one_entry() -> None:
    source = read_program("models(deltas):\n    return deltas[0]\n", Form.SHORT)
    assert source.count("def merge_models(") == 1


@pytest.mark.parametrize("text", ["", "x", "x(deltas)", "x = 3\n    return 4", "\n\n\n"])
def test_text_without_a_function_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        read_program(text, Form.SHORT)


def test_the_contracts_form_is_taken_from_its_block() -> None:
    answer = "Here:\n```python\nx = 1\n```\nand\n```python\ndef merge_models(model_dict, device):\n    return 1\n```\nDone."
    assert read_program(answer, Form.CONTRACT) == "def merge_models(model_dict, device):\n    return 1\n"
    cut = "```python\ndef merge_models(model_dict, device):\n    return 1"
    assert read_program(cut, Form.CONTRACT).startswith("def merge_models")
    with pytest.raises(Unreadable):
        read_program("I cannot do that.", Form.CONTRACT)


@pytest.mark.parametrize(
    "fence", ["```", "```Python", "```python3", "```py title=a", "```bash\npip\n```\n```python"]
)
def test_a_block_may_be_opened_in_any_way(fence: str) -> None:
    program = "def merge_models(model_dict, device):\n    return 1\n"
    assert read_program(f"Here:\n{fence}\n{program}```\nDone.", Form.CONTRACT) == program


def test_what_was_thought_aloud_and_what_was_shown_is_no_answer() -> None:
    draft, program = (f"def merge_models(model_dict, device):\n    return {n}\n" for n in (1, 2))
    blocks = [f"```python\n{each}```\n" for each in (draft, program)]
    for answer in (
        f"<think>Perhaps\n{blocks[0]}no.</think>\n{blocks[1]}",
        f"{blocks[0]}no.</think>\n{blocks[1]}",  # the template has begun the thought
        f"The example is\n{blocks[0]}and this is better:\n{blocks[1]}",
    ):
        assert read_program(answer, Form.CONTRACT) == program
    with pytest.raises(Unreadable):
        read_program(f"<think>Perhaps\n{blocks[0]}or", Form.CONTRACT)


def test_a_program_in_the_contracts_form_that_hands_over_is_shown_whole() -> None:
    program = (
        "import torch\n\n\ndef merge_weighted(model_dict, device):\n    return sum(model_dict.values())\n\n\n"
        "def merge_models(model_dict, device):\n    return merge_weighted(model_dict, device)\n"
    )
    assert unwrap_short(program) == program


def test_canonical_form_forgets_names_constants_docstrings_and_comments() -> None:
    a = 'def f(deltas, k=2):\n    """Doc."""\n    total = sum(deltas)  # add\n    return 0.5 * total.clamp(min=-1)\n'
    b = "def g(xs: list, n: int = 3) -> object:\n    y: int = sum(xs)\n    return -2 * y.clamp(min=0.1)\n"
    assert canonical(a) == canonical(b)


@pytest.mark.parametrize(
    "other",
    [
        "def f(deltas):\n    return sum(deltas).abs()\n",
        "def f(deltas):\n    return max(deltas)\n",
        "def f(deltas):\n    return sum(deltas, deltas)\n",
        'def f(deltas):\n    return sum(deltas) + "a"\n',
    ],
)
def test_canonical_form_keeps_what_is_called(other: str) -> None:
    assert canonical("def f(deltas):\n    return sum(deltas)\n") != canonical(other)


def test_every_worked_example_has_a_canonical_form_of_its_own() -> None:
    forms = {canonical(wrap_short(source)) for source in examples().values()}
    assert len(forms) == len(examples())


@given(st.text(max_size=300))
def test_reading_never_fails_in_another_way(text: str) -> None:
    for form in Form:
        with contextlib.suppress(Unreadable):
            assert "merge_" in read_program(text, form)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("return d * n / (k + 1e-8)", "return n * d / (1 + k)"),
        ("return 0.5 * (a + b * c + f(d))", "return (f(d) + c * b + a) * 2"),
        ("x = a + b\n    return x - c", "x = b + a\n    return x - c"),
    ],
)
def test_the_order_of_terms_and_factors_makes_no_new_program(one: str, other: str) -> None:
    frame = "def merge_models(model_dict, device):\n    a, b, c, d, k, n = model_dict.values()\n    {}\n"
    assert canonical(frame.format(one)) == canonical(frame.format(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("return a - b * a", "return b - a * a"),
        ("return a / b", "return b / a"),
        ("return a @ b", "return b @ a"),
        ("return a + b * c", "return (a + b) * c"),
    ],
)
def test_what_does_not_commute_keeps_its_order(one: str, other: str) -> None:
    frame = "def merge_models(model_dict, device):\n    a, b, c = model_dict.values()\n    {}\n"
    assert canonical(frame.format(one)) != canonical(frame.format(other))
