"""What the factory is asked: the task, the signature, worked examples.

`fixed` asks the same in every iteration, as in the paper. `drawn` deals the worked examples out anew for every
prompt, since a small factory copies whatever example it always sees.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfdev.algorithms.source import ENTRY, OPENING, Form, unwrap_short, wrap_short
from selfdev.settings import PromptSettings
from selfdev.streams import stream_seed

if TYPE_CHECKING:  # whoever only shows a run need not wait for it
    from transformers import PreTrainedTokenizerBase

SHORT_HEAD = '''"""Merge expert models by combining their task vectors.

Each algorithm receives `deltas`, the task vectors (expert minus seed) of all experts in one tensor:
deltas[0] is that of the first expert. It returns the merged task vector, of the shape of deltas[0].
"""
import torch


'''

CONTRACT_TASK = '''\
Several expert models were fine-tuned from one seed model. A task vector is an expert's parameter tensor minus the \
seed's. Write a new algorithm that combines the experts' task vectors into one merged task vector, which is added to \
the seed, so that the merged model keeps the skills of all experts.

The algorithm is one Python function with this signature, called once for every parameter tensor:

```python
import torch

def merge_models(model_dict, device):
    """
    Args:
        model_dict (dict): the experts' names, each with its task vector, a float32 torch.Tensor; all of one shape.
        device (str): where to compute, for example "cpu".

    Returns:
        torch.Tensor: the merged task vector, of that shape.
    """
```

Here is an example:

```python
{example}```

Invent an algorithm that differs from the example in its idea. Answer with one Python code block and nothing else.
'''

CONTRACT_TURN = """
This algorithm was written, and it fails:

```python
{program}```

Its error: {error}

Write it corrected, as one Python code block.
"""

LONGEST_ERROR = 200
"""Characters of an error that a prompt shows: it may be what the program itself says, and of any length."""

STOP = {
    Form.SHORT: re.compile(r"\n\n\n|\n\S"),
    Form.CONTRACT: re.compile(r"```\w*[ \t]*\n(?s:.*)\n```"),
}
"""What ends a program, searched for in all that was written: the function's end, or that of the first code block."""


Template = tuple[tuple[str, bool | int | float | str], ...]
"""Names and values."""


@dataclass(frozen=True)
class Prompt:
    """One question to the factory.

    Attributes:
        text: the whole text that the factory continues (before any chat template).
        examples: names of the worked examples in it.
        form: the form of the answer.
        template: what the chat template is given beside the message.
    """

    text: str
    examples: tuple[str, ...]
    form: Form
    template: Template = ()

    def tokens(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Token ids of the prompt: in the chat template where the answer is a message and there is one."""
        if self.form is Form.CONTRACT and tokenizer.chat_template:
            message = [{"role": "user", "content": self.text}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False, **dict(self.template)
            )
            return [int(i) for i in ids]
        return [int(i) for i in tokenizer(self.text).input_ids]


def ask(names: Sequence[str], sources: Mapping[str, str], form: Form, template: Template = ()) -> Prompt:
    """Build the prompt that shows the named examples.

    Args:
        names: which examples, in this order.
        sources: of every known example, in the short form; in the contract's form also in that.
        form: what is asked for.
        template: what the chat template is given beside the message.
    """
    if form is Form.SHORT:
        shown = "\n\n".join(sources[name] for name in names)
        return Prompt(f"{SHORT_HEAD}{shown}\n\n{OPENING}", tuple(names), form, template)
    whole = [sources[name] for name in names]
    shown = "```\n\n```python\n".join(s if f"def {ENTRY}(" in s else wrap_short(s) for s in whole)
    return Prompt(CONTRACT_TASK.format(example=shown), tuple(names), form, template)


def prompts_of(
    settings: PromptSettings, sources: dict[str, str], seed: int, iteration: int, programs: int
) -> list[Prompt]:
    """The prompts of one iteration: one and always the same, or dealt out anew.

    Args:
        settings: which.
        sources: short source of every known example.
        seed: the run's.
        iteration: names the random stream of the deal.
        programs: of the iteration, which has no more prompts than these.
    """
    hands: Sequence[Sequence[str]] = [settings.names]
    if settings.examples == "drawn":
        count = min(settings.prompts, programs)
        hands = deal(sources, count, settings.shown, stream_seed(seed, "prompts", iteration))
    template = tuple(settings.template.items())
    return [ask(names, sources, settings.form, template) for names in hands]


def showing(
    prompts: Sequence[Prompt], programs: Mapping[str, str], sources: Mapping[str, str]
) -> list[Prompt]:
    """The prompts with a program in the place of each one's last example, which is the one that is read last.

    Args:
        prompts: to be changed.
        programs: name and source, in the contract's form, of those to show, which take turns; with none of them nothing
            changes.
        sources: short source of every known example.
    """
    if not programs:
        return list(prompts)
    known = {**sources, **{name: unwrap_short(source) for name, source in programs.items()}}
    names = itertools.cycle(programs)
    return [
        ask((*prompt.examples[:-1], next(names)), known, prompt.form, prompt.template) for prompt in prompts
    ]


def correcting(prompt: Prompt, program: str, error: str) -> Prompt:
    """A prompt with a program that was written under it and fails, to be written once more.

    Args:
        prompt: the usual one; the new one begins with its text.
        program: in the contract's form.
        error: why it fails, shown on one line of at most `LONGEST_ERROR` characters.
    """
    shown = " ".join(error.split())[:LONGEST_ERROR]
    if prompt.form is Form.CONTRACT:
        return replace(prompt, text=prompt.text + CONTRACT_TURN.format(program=program, error=shown))
    failed = unwrap_short(program).removeprefix(OPENING).rstrip("\n")
    return replace(prompt, text=f"{prompt.text}{failed}\n\n\n# It fails: {shown}\n# Corrected:\n{OPENING}")


def base_of(text: str, texts: Sequence[str]) -> int:
    """Which of an iteration's prompts this one of them goes back to: itself, or what `correcting` made it from.

    Args:
        text: of the prompt.
        texts: of all prompts of the iteration, this one among them.
    """
    begins = [index for index, other in enumerate(texts) if text.startswith(other)]
    return min(begins, key=lambda index: len(texts[index]))


def deal(sources: dict[str, str], prompts: int, examples: int, seed: int) -> list[tuple[str, ...]]:
    """Deal examples out to prompts as cards: none comes twice before all have come once.

    Args:
        sources: the known examples.
        prompts: how many prompts.
        examples: how many examples each.
        seed: of the shuffle.

    Returns:
        For each prompt the names of its examples, all different.
    """
    shuffle = random.Random(seed)
    deck: list[str] = []
    hands: list[tuple[str, ...]] = []
    for _ in range(prompts):
        hand: list[str] = []
        while len(hand) < examples:
            if not deck:
                deck = shuffle.sample(sorted(sources), len(sources))
            hand.append(deck.pop()) if deck[-1] not in hand else deck.insert(0, deck.pop())
        hands.append(tuple(hand))
    return hands
