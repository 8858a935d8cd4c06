"""Log-likelihood of the gold solution, in nats a token, for models that are too weak to answer.

It moves before the first answer is right, so it ranks candidates where accuracy is zero for all. It says nothing
about whether the model would write the solution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from selfdev.errors import UserError
from selfdev.evaluation.scoring.continuations import Continuations, attending
from selfdev.evaluation.scoring.prompts import Prompts, check_fits, tokenize
from selfdev.evaluation.scoring.scored import Scored, ScoringError
from selfdev.evaluation.tasks import Question

BATCH_TOKENS = 2048
"""Tokens of one forward pass: the logits of each are as many numbers as there are tokens in the vocabulary."""


@dataclass(frozen=True)
class Likelihood:
    """Questions with their gold solutions as tokens, made once and used for every candidate.

    Attributes:
        prompts: question and solution.
        solutions: how many of the last tokens of each are the solution's.
    """

    prompts: Prompts
    solutions: list[int]

    @classmethod
    def prepare(cls, config: Any, tokenizer: Any, questions: Sequence[Question]) -> "Likelihood":
        """Tokenise questions and solutions together; what exceeds the prompt's tokens is the solution's.

        That is how lm-evaluation-harness counts them.

        Raises:
            UserError: there is none, one does not fit the model's context, or the tokenizer lacks a character.
        """
        prompts = tokenize(tokenizer, questions, [question.text for question in questions])
        whole = tokenize(tokenizer, questions, [question.text + question.gold for question in questions])
        check_fits(config, questions, list(map(len, whole)), 0)
        solutions = [len(both) - len(prompt) for both, prompt in zip(whole, prompts, strict=True)]
        for question, count in zip(questions, solutions, strict=True):
            if count < 1:
                raise UserError(f"{question.named}: the solution adds no token to the prompt")
        shared = Prompts.of(prompts).shared  # the solutions' own tokens are never in the common part
        return cls(Prompts(shared, [both[len(shared) :] for both in whole]), solutions)

    @torch.inference_mode()
    def __call__(self, model: Any) -> Scored:
        """The mean log-probability of each solution's tokens, given the prompt.

        Raises:
            ScoringError: one is infinite or not a number.
        """
        common = self.prompts.prefill(model)
        outcomes = torch.zeros(len(self.solutions))
        with attending(model):
            for batch in self._batches():
                rest = [self.prompts.rest[i] for i in batch]
                longest = max(map(len, rest))
                # Each of a solution's tokens is foretold by the place before it.
                first = min(len(rest[row]) - self.solutions[i] for row, i in enumerate(batch)) - 1
                forward = partial(model, logits_to_keep=longest - first)
                logits = Continuations(common, len(batch), longest).read(forward, rest).logits
                for row, i in enumerate(batch):
                    end = len(rest[row]) - 1 - first
                    gold = torch.tensor(rest[row][-self.solutions[i] :], device=logits.device)
                    each = logits[row, end - self.solutions[i] : end].float()
                    outcomes[i] = -F.cross_entropy(each, gold).cpu()
        if not outcomes.isfinite().all():
            raise ScoringError(
                "the solutions' log-likelihoods are not finite; the weights are broken, or overflow in their type"
            )
        return Scored(outcomes)

    def _batches(self) -> Iterator[list[int]]:
        order = self.prompts.longest_first()
        while order:
            count = max(1, BATCH_TOKENS // len(self.prompts.rest[order[0]]))
            yield order[:count]
            order = order[count:]
