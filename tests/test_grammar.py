import random
import re
import symtable
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from byte_model import byte_model, byte_tokenizer, save_byte_model
from scripted import writer_config
from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import OPENING, Form, read_program
from selfdev.config import load_config
from selfdev.errors import UserError
from selfdev.factory.factory import LocalFactory
from selfdev.factory.prompt import STOP
from selfdev.factory.sampling import Sampler
from selfdev.sandbox.syntax import compile_program
from tiny import tiny_tokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
from selfdev.factory.grammar import Grammar
from selfdev.factory.grammar_place import BUILTINS

TOKENIZER = byte_tokenizer()
GRAMMAR = Grammar(TOKENIZER, 257)
HEAD = "x(deltas):\n"
TOKEN_OF = {TOKENIZER.decode([token]): token for token in range(1, 257)}
VOID = "\x00"
"""Stands for the end token, and is no byte of a program."""
TOKEN_OF[VOID] = TOKENIZER.eos_token_id


def refused_at(text: str) -> str | None:
    """What of the text is written before the first byte that the grammar refuses; None if it refuses none."""
    writing = GRAMMAR.begin()
    for place, sign in enumerate(text):
        if not writing.allowed()[TOKEN_OF[sign]]:
            return text[:place]
        writing.add(TOKEN_OF[sign], sign)
    return None


@pytest.mark.parametrize("name", examples())
def test_every_worked_example_is_in_the_grammar(name: str) -> None:
    assert refused_at(examples()[name].removeprefix(OPENING) + "\n\n") is None


@pytest.mark.parametrize("end", [VOID, "\n" + VOID, "\n\n\n", "\ndef", "\n\n#"])
def test_a_function_may_end_in_every_way_that_ends_it(end: str) -> None:
    assert refused_at(HEAD + "    return deltas[0]" + end) is None


@pytest.mark.parametrize(
    "body",
    [
        "    d = deltas[0]\n    d *= 2\n    return d\n",
        "    # a comment\n    d = deltas[0]  # another\n\n    return d\n",
        "    total = 0\n    for i, (a, b) in enumerate(zip(deltas, deltas)):\n        total += i * a * b\n    return total\n",
        "    return sum(w * d for w, d in zip(deltas.norm(dim=0), deltas))\n",
        "    return torch.stack([d for d in deltas if d.norm() > 0]).sum(dim=0)\n",
        "    return torch.stack([sum(a * b for b in deltas) for a in deltas]).mean(dim=0)\n",
        "    return sum(a * deltas[0] for i, (a, d) in enumerate(zip(deltas, deltas)))\n",
        "    return torch.stack([sum(b) * a for i, (a, b) in enumerate(zip(deltas, deltas))])[0]\n",
        "    if len(deltas) > 2:\n        return deltas[0]\n    elif deltas.ndim == 1:\n        return deltas\n    else:\n"
        "        return deltas[1]\n",
        "    for d in deltas:\n        if d.max() > 1:\n            continue\n        break\n    return d\n",
        '    return torch.linalg.norm(deltas, ord="nuc", dim=0)\n',
        "    sum = torch.sum(deltas, dim=0)\n    return sum / sum.norm()\n",
        "    out = []\n    for d in deltas:\n        out.append(d.clamp(max=1, min=-1))\n    return torch.stack(out).mean(0)\n",
        "    u, s, v = torch.linalg.svd(deltas[0])\n    s[1:] = 0\n    return (u * s) @ v\n",
        "    return -deltas[0] if not deltas.shape[0] == 1 and True else 1.5e-3 * deltas.max(dim=0).values[..., :-1]\n",
        '    """A docstring\n    of two lines.\n    """\n    return deltas.float().to(torch.float32).T\n',
    ],
)
def test_what_factories_write_is_in_the_grammar(body: str) -> None:
    assert refused_at(HEAD + body + VOID) is None
    compile_program(read_program(HEAD + body, Form.SHORT))


@pytest.mark.parametrize(
    ("written", "refused", "why"),
    [
        ("    return d", "[", "no such name"),
        ("    weights = [d.norm() for d in deltas]\n    return d", ".", "a comprehension's name is its own"),
        ("    return sum(w * d for i", " in", "the target binds what the element reads"),
        ("    return sum(w * d for w", " ", "and all of it"),
        ("    return torch.stack([d", ", ", "no `for` gives the name"),
        ("    return torch.cor", "r(", "torch has none"),
        ("    return deltas.lognorm"[:-4], "norm", "tensors have none"),
        ("    return deltas.abs", " ", "a method is called"),
        ("    return deltas.abs(", "0", "it takes no argument"),
        ("    return deltas.sum(dim=0, ", "dim=", "a keyword comes once"),
        ("    return deltas.sum(dim=0, ", "1", "no positional argument behind a keyword"),
        ("    return deltas", "(", "a tensor is not called"),
        ("    return deltas.sum(dim=0", "\n", "the bracket is open"),
        ("    total", " +=", "nothing to add to"),
        ("    total = ", "total", "not given yet"),
        ("    sum = ", "sum(", "the assignment makes it a local"),
        ("    x = sum(deltas)\n    sum", " =", "the assignment makes it a local above"),
        ("    for d in deltas:\n    ", "return", "the block is empty"),
        ("    x = deltas\n    ", "    ", "no block is open"),
        ("    x = deltas\n   ", "x", "no such column"),
        ("    x = deltas\n", VOID, "nothing is returned"),
        ("    x = deltas\n", "x", "nothing is returned"),
        ("    x = deltas\n\n", "\n", "nothing is returned"),
        ("    return deltas\n", " ", "the function has ended"),
        ("    x = deltas\n    ", "else:", "no `if`"),
        ("    ", "break\n", "no loop"),
        ("    deltas.abs()", " =", "no target"),
        ("    x = deltas * ", "not ", "`not` binds less"),
        ("    return 0", "1", "no such number"),
        ("    ", "import ", "not in the grammar"),
    ],
)
def test_what_cannot_work_is_refused(written: str, refused: str, why: str) -> None:
    stopped = refused_at(HEAD + written + refused)
    assert stopped is not None, why
    assert stopped.startswith(HEAD + written), f"refused too early: {stopped!r}"


BITS = (
    *(
        "deltas",
        "torch.",
        "sum(",
        "zip(",
        "len(",
        "stack([",
        ".norm(",
        ".abs()",
        ".max(",
        "dim=0",
        "[0]",
        "[",
        "(",
        "-1:",
    ),
    *(
        ", ",
        ", ",
        " * ",
        " + ",
        " - ",
        " > ",
        " == ",
        " and ",
        "not ",
        " if ",
        " else ",
        " for ",
        " in ",
        "a",
        "b",
        "d",
    ),
    *(
        ")",
        "]",
        ")",
        "]",
        ":\n",
        "\n",
        "\n",
        "\n",
        "    ",
        "    ",
        "for ",
        "if ",
        "else:",
        "elif ",
        "break",
        "return ",
    ),
    *("a = ", "b = ", "sum = ", "a += ", "a, b = ", "1", "0.5", "e-8", "True"),
)
"""What programs are made of; what of it fits is written at random."""


LAST = [{")", "]", "\n", ":\n"}, {"deltas"}, {" for ", " in ", " else ", "    ", "return "}]
"""What a program comes to its end with, the best first."""


def random_program(seed: int) -> str | None:
    """Whatever the grammar lets through of random bits, the end first; None if it does not end."""
    draw, writing, text = random.Random(seed), GRAMMAR.begin(), ""
    bits = [HEAD]
    while len(text) < 400:
        for sign in draw.choice(bits):
            if not writing.allowed()[TOKEN_OF[sign]]:
                break
            writing.add(TOKEN_OF[sign], sign)
            text += sign
        allowed = writing.allowed()
        if allowed[TOKEN_OF[VOID]]:
            return text
        in_word = text[-1].isalnum()
        bits = [bit for bit in BITS if allowed[TOKEN_OF[bit[0]]] and not (in_word and bit[0].isalnum())]
        for last in LAST if len(text) > 60 else []:
            if last.intersection(bits):
                bits = [bit for bit in bits if bit in last]
                break
        bits = bits or [sign for sign, token in TOKEN_OF.items() if allowed[token] and sign.isascii()]
    return None


def global_names(table: symtable.SymbolTable) -> set[str]:
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names.union(*(global_names(child) for child in table.get_children()))


def test_whatever_it_lets_through_is_python_with_names_in_scope() -> None:
    ended = [text for text in map(random_program, range(60)) if text is not None]
    assert len(ended) >= 3  # most run into the limit; none runs into a place where nothing fits
    for text in ended:
        source = OPENING + text + "\n"
        compile_program(read_program(text, Form.SHORT))
        [function] = symtable.symtable(source, "<program>", "exec").get_children()
        assert global_names(function) <= BUILTINS | {"torch"}, source


PROMPTS = [TOKENIZER("import torch\n\n\ndef merge_").input_ids, TOKENIZER("def merge_").input_ids]


def sampler(**changes: object) -> Sampler:
    settings = {
        "temperature": 1.0,
        "top_p": 0.95,
        "max_new_tokens": 120,
        "stop": STOP[Form.SHORT],
        "grammar": GRAMMAR,
    }
    return Sampler(**settings | changes)  # type: ignore[arg-type]


def test_an_untrained_model_writes_beginnings_of_programs() -> None:
    groups = sampler()(byte_model(), TOKENIZER, PROMPTS, [[1, 2, 3], [4, 5]])
    for group in groups:
        for sample in group:
            assert refused_at(sample.text) is None
            assert re.match(r"\w+\(deltas\):\n", sample.text) or not sample.finished


def test_places_are_taken_over_and_log_probs_are_the_models_own() -> None:
    model = byte_model()
    settings = {"max_new_tokens": 40, "stop": re.compile(r"deltas")}
    seeds = [list(range(7)), list(range(20, 25))]
    groups = sampler(batch=3, **settings)(model, TOKENIZER, PROMPTS, seeds)
    for prompt, group, its in zip(PROMPTS, groups, seeds, strict=True):
        for sample, seed in zip(group, its, strict=True):
            [[alone]] = sampler(**settings)(model, TOKENIZER, [prompt], [[seed]])
            assert sample.tokens == alone.tokens
            ids = torch.tensor([[*prompt, *sample.tokens]])
            log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[0, len(prompt) :, None]).sum().item()
            assert sample.log_prob == pytest.approx(expected, abs=1e-3)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"factory\.grammar: python needs a tokenizer"):
        Grammar(tokenizer, 257)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(UserError, match=r"pip install 'selfdev\[grammar\]'"):
        Grammar(tiny_tokenizer(), 64)


def test_a_factory_writes_under_the_grammar_and_says_so(tmp_path: Path) -> None:
    folder = save_byte_model(tmp_path / "model")
    config = writer_config(folder)
    under = config.factory.model_copy(update={"grammar": "python"})
    factory = LocalFactory(config.model_copy(update={"factory": under}))
    asked = list(enumerate(factory.prompts(0) * 3))
    written = factory.write(asked, 0, 1.0, [], lambda done, total, note: None)
    assert all(refused_at(sample.text) is None for sample in written)
    assert factory.facts["grammar"] == f"llguidance {version('llguidance')}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("prompt.form=contract", r"factory\.grammar: the grammar is that of one function"),
        (
            "factory.endpoint={url: 'http://localhost:8000/v1'}",
            r"factory\.grammar: a server samples by itself",
        ),
    ],
)
def test_where_there_is_no_grammar_it_is_refused(change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_config("quickstart", ["factory.grammar=python", "factory.warm_start.steps=0", change])
