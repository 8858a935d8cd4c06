"""Scoring: a model's outcome on each question, in the way that the task asks for.

| way             | cost                          | outcome of a question                         |
| --------------- | ----------------------------- | --------------------------------------------- |
| `exact`         | one pass over prompt + answer | right or wrong                                |
| `generate`      | one pass a token written      | right or wrong                                |
| `loglikelihood` | one pass over prompt + answer | mean log-probability a token, in nats, <= 0   |

A model whose logits are not finite is a failure (`ScoringError`), never a score.
"""

from collections.abc import Callable, Sequence
from typing import Any

from selfdev.evaluation.scoring.continuations import check_continues
from selfdev.evaluation.scoring.exact import BATCH_TOKENS, Batch, Encoded, encode, score_exact
from selfdev.evaluation.scoring.generate import Generation
from selfdev.evaluation.scoring.loglikelihood import Likelihood
from selfdev.evaluation.scoring.prompts import check_fits
from selfdev.evaluation.scoring.scored import Reply, Scored, ScoringError
from selfdev.evaluation.tasks import Question
from selfdev.evaluation.tasks.grading import Grading, Way
from selfdev.models.limits import end_tokens

__all__ = [
    "BATCH_TOKENS",
    "Batch",
    "Encoded",
    "Reply",
    "Scored",
    "Scoring",
    "ScoringError",
    "encode",
    "prepare",
    "score_exact",
]

Scoring = Callable[[Any], Scored]
"""Scores a model on the questions that it was prepared with."""


def prepare(model: Any, tokenizer: Any, questions: Sequence[Question], grading: Grading) -> Scoring:
    """Turn questions into tensors once, for any number of models of one architecture and tokenizer.

    Args:
        model: one of them, asked for its config and end tokens, and whether it can be scored in this way.
        tokenizer: theirs.
        questions: at least one.
        grading: how answers are written, read and judged.

    Returns:
        What scores a model: called with it, it gives the outcomes in the order of the questions, or raises
        `ScoringError`.

    Raises:
        UserError: a question does not fit the model's context or its tokenizer, or it or the model cannot be scored
            in this way.
    """
    if grading.way is not Way.EXACT:
        check_continues(model)
    match grading.way:
        case Way.GENERATE:
            return Generation.prepare(model.config, tokenizer, questions, grading)
        case Way.LOGLIKELIHOOD:
            return Likelihood.prepare(model.config, tokenizer, questions)
        case Way.EXACT:
            encoded = encode(tokenizer, questions, stop=grading.stop, ends=end_tokens(model, tokenizer))
            check_fits(model.config, questions, encoded.lengths, 0)
            return lambda model: Scored(score_exact(model, encoded))
