"""What scoring yields: an outcome for each question, and the score that they make."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.evaluation.tasks.grading import Reading


class ScoringError(SelfdevError):
    """The model gives no usable logits: a failure of the model, never a score of zero."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote to one question.

    Attributes:
        text: up to the stop string.
        readings: what each extraction found in it, and whether that is right.
    """

    text: str
    readings: Mapping[str, Reading]


@dataclass(frozen=True)
class Scored:
    """A model's outcomes on the questions, in their order.

    Attributes:
        outcomes: shape (questions,), on the CPU; bool (right or wrong), or float32 (nats a token, above is better)
            where the task is scored by likelihood.
        replies: what it wrote, if it wrote anything.
    """

    outcomes: Tensor
    replies: tuple[Reply, ...] = ()
