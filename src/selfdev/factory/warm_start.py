"""A supervised warm start of a weak factory on the human-designed worked examples.

A model of some hundred million parameters rarely writes Python that runs. Here it is trained for a few steps to
write one worked example when it is shown others, which teaches the form and the idioms. No programs of a run and
no scores take part. The adapter depends on the base weights, the examples and the settings alone, so it is
cached under their hash.
"""

import random
from collections.abc import Callable, Sequence

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from selfdev.algorithms.source import OPENING, Form
from selfdev.factory.imitation import Lesson, imitate
from selfdev.factory.prompt import ask

END = "\n\n"
"""What follows a program that is finished: with the newline that ends its last line, the stop."""


def warm_start(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: dict[str, str],
    *,
    steps: int,
    learning_rate: float,
    shown: int,
    targets: int,
    seed: int,
    tick: Callable[[int, float], None] = lambda step, loss: None,
    fitting: Callable[[Sequence[Lesson]], int | None] = lambda lessons: None,
) -> None:
    """Train the adapter in place.

    Args:
        model: the factory with a new adapter.
        tokenizer: its tokenizer.
        sources: short source of every worked example.
        steps: optimiser steps; each has one prompt.
        learning_rate: peak rate of AdamW; it falls linearly to a tenth.
        shown: examples in the prompt.
        targets: examples to be written, in one packed pass.
        seed: of the draw.
        tick: called after each step with its number and its loss in nats a token.
        fitting: how many tokens a pass of these lessons may hold; see `memory.fitting_pass`.

    Raises:
        Diverged: a loss or a weight is not finite.
    """
    draw = random.Random(seed)
    deck: list[str] = []
    lessons = []
    for _ in range(steps):
        # Targets are dealt as cards, so that all examples are written about equally often.
        if len(deck) < targets:
            deck = draw.sample(sorted(sources), len(sources))
        wanted = [deck.pop() for _ in range(targets)]
        names = draw.sample([name for name in sorted(sources) if name not in wanted], shown)
        prompt = ask(names, sources, Form.SHORT).tokens(tokenizer)
        completions = tuple(tuple(completion(tokenizer, sources[name])) for name in wanted)
        lessons.append(Lesson(tuple(prompt), completions))
    imitate(model, lessons, learning_rate, tick, fitting(lessons), "factory.warm_start.learning_rate")


def completion(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Token ids with which a prompt of the short form is continued to be this worked example."""
    text = source.removeprefix(OPENING).rstrip("\n") + "\n" + END
    return [int(i) for i in tokenizer(text, add_special_tokens=False).input_ids]
