"""Exceptions that lie: about their class, in their message, or by ending the process."""

import pytest
import torch
from canaries import program

from selfdev.sandbox import Sandbox

RAISES = {
    "system_exit": ("sys.exit(0)", "SystemExit"),
    "keyboard_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "generator_exit": ("raise GeneratorExit", "GeneratorExit"),
    "message_raises": (
        "class E(Exception):\n    def __str__(self): raise E\nraise E",
        "Exception",
    ),
    "message_is_no_string": (
        "class E(Exception):\n    def __str__(self): return 3\nraise E",
        "Exception",
    ),
    "message_is_a_strange_string": (
        "class S(str):\n    def __getitem__(self, i): raise SystemExit\n    def split(self): raise SystemExit\n"
        "class E(Exception):\n    def __str__(self): return S('x' * 5000)\nraise E",
        "Exception",
    ),
    "class_name_raises": (
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\nclass E(Exception, metaclass=M): pass\nraise E",
        "Exception",
    ),
    "class_name_with_controls": ("raise type('\\x1b[31mok\\n', (Exception,), {})", "Exception"),
    "class_name_too_long": ("raise type('E' * 5000, (Exception,), {})", "Exception"),
    "raises_a_class_that_lies": (
        "class E(Exception):\n    __class__ = property(lambda self: SystemExit)\nraise E",
        "Exception",
    ),
    "class_of_a_library": ("torch.linalg.inv(torch.zeros(2, 2))", "Exception"),
    "class_of_python": ("raise TimeoutError", "TimeoutError"),
}


@pytest.mark.parametrize("name", RAISES)
def test_any_exception_is_an_error(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body, failure = RAISES[name]
    first, second = box.merge_many(program(body), [model_dict, model_dict])
    assert (first.status, first.failure) == ("error", failure), first
    assert second == first or second.failure == failure


MESSAGES = {
    "huge": "raise ValueError('x' * 10**6)",
    "control_characters": "raise ValueError('\\x1b[2J\\r\\n\\x00\\x07bell')",
    "direction_marks": "raise ValueError('\\u202e\\u2066gnidaelsim\\u200b')",
    "lone_surrogates": "raise ValueError('\\ud800' * 500)",
    "astral": "raise ValueError('\\U0001f600' * 5000)",
    "address": "raise ValueError(object())",
    "invisible": "raise ValueError('\\u3164\\u2800\\u00ad\\u034f' * 9)",
    "piled_up": "raise ValueError('a' + '\\u0301' * 200)",
    "right_to_left": "raise ValueError('\\u05d0\\u05d1')",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_short_clean_and_repeatable(
    name: str, box: Sandbox, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = box.merge(program(MESSAGES[name]), model_dict)
    assert (outcome.status, outcome.failure) == ("error", "ValueError")
    assert len(outcome.error) <= 300
    assert outcome.error.isprintable()
    assert outcome.error.isascii()
    assert narrow_box.merge(program(MESSAGES[name]), model_dict).error == outcome.error
