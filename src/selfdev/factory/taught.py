"""What a factory is taught in one round, before it is made into steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from selfdev.factory.prompt import Prompt

Tokens = tuple[int, ...]
"""A program as it was sampled, or as it would be tokenised."""


@dataclass(frozen=True)
class Taught:
    """Programs under the prompts that they were sampled from.

    Attributes:
        pairs: the prompt, the chosen program, the rejected one.
        imitated: the prompt, and the program that `refinement.imitation` imitates.
        flip_rate: share of the pairs that are probably the wrong way round, in 0..1.
    """

    pairs: Sequence[tuple[Prompt, Tokens, Tokens]]
    imitated: Sequence[tuple[Prompt, Tokens]] = ()
    flip_rate: float = 0.0
