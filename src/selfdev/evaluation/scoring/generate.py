"""Greedy decoding until a stop string, for many questions at once.

What all prompts begin with, such as the few-shot examples, is computed once and kept once (`Continuations`). A row
that has finished leaves the batch, and the next questions take the places that are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.evaluation.scoring.continuations import Continuations, attending
from selfdev.evaluation.scoring.prompts import Prompts, check_fits, tokenize
from selfdev.evaluation.scoring.scored import Reply, Scored, ScoringError
from selfdev.evaluation.tasks import Question
from selfdev.evaluation.tasks.grading import Grading
from selfdev.models.limits import end_tokens

ROWS = 64
"""Questions answered at once: on a CPU the cores are full well below, on a GPU memory bounds it."""
CACHE_TOKENS = 24_576
"""Tokens whose keys and values the rows may hold beside the common beginning: 1.1 GB for SmolLM2-135M."""
READ_TOKENS = 2048
"""Tokens that go through the model at once while prompts are read."""
REFILL = 1 / 16
"""Share of the rows that must be free before new questions are read: one by one they would read at a row's pace."""


@dataclass(frozen=True)
class Generation:
    """Questions as tokens, made once and answered by every candidate.

    Attributes:
        questions: what is asked.
        prompts: the same as tokens.
        tokenizer: the model's.
        grading: where an answer stops, and how it is judged.
    """

    questions: Sequence[Question]
    prompts: Prompts
    tokenizer: Any
    grading: Grading

    @classmethod
    def prepare(
        cls, config: Any, tokenizer: Any, questions: Sequence[Question], grading: Grading
    ) -> "Generation":
        """Tokenise the questions.

        Raises:
            UserError: there is none, one does not fit the model's context, or the tokenizer lacks a character.
        """
        sequences = tokenize(tokenizer, questions, [question.text for question in questions])
        check_fits(config, questions, list(map(len, sequences)), grading.max_new_tokens)
        return cls(questions, Prompts.of(sequences), tokenizer, grading)

    def __call__(self, model: Any) -> Scored:
        """Let the model answer, and judge what it wrote.

        Raises:
            ScoringError: a logit is infinite or not a number.
        """
        replies = [
            Reply(text, self.grading.read(text, question.answer))
            for text, question in zip(self.texts(model), self.questions, strict=True)
        ]
        right = [next(iter(reply.readings.values())).right for reply in replies]
        return Scored(torch.tensor(right), tuple(replies))

    @torch.inference_mode()
    def texts(self, model: Any) -> list[str]:
        """What the model writes to each question, cut before the stop string."""
        rest = self.prompts.rest
        waiting = self.prompts.longest_first()
        longest = len(rest[waiting[0]]) + self.grading.max_new_tokens
        places = max(1, min(ROWS, CACHE_TOKENS // longest, len(rest)))
        ends = end_tokens(model, self.tokenizer)
        answers = [_Answer(self.tokenizer, self.grading, ends) for _ in rest]
        rows = list[_Answer]()
        continuations = Continuations(self.prompts.prefill(model), places, longest)
        with attending(model):
            while rows or waiting:
                free = places - len(rows)
                if waiting and free >= max(1, places * REFILL):
                    count = min(free, max(1, READ_TOKENS // len(rest[waiting[0]])))
                    new, waiting = waiting[:count], waiting[count:]
                    states = continuations.read(model.base_model, [rest[i] for i in new]).last_hidden_state
                    states = states[range(len(new)), [len(rest[i]) - 1 for i in new]]
                    grown = [answers[i] for i in new]
                    rows += grown
                else:
                    latest = [row.tokens[-1] for row in rows]
                    states = continuations.step(model.base_model, latest).last_hidden_state[:, 0]
                    grown = rows
                for row, token in zip(grown, _greedy(model, states), strict=True):
                    row.add(token)
                going = [place for place, row in enumerate(rows) if not row.finished]
                if len(going) < len(rows):
                    rows = [rows[place] for place in continuations.keep(going)]
        return [answer.text() for answer in answers]


class _Answer:
    """What has been written to one question.

    Attributes:
        tokens: written so far, the end token left out.
        finished: whether nothing more is written.
    """

    def __init__(self, tokenizer: Any, grading: Grading, ends: set[int]):
        self.tokens: list[int] = []
        self.finished = False
        self._tokenizer, self._grading, self._ends = tokenizer, grading, ends
        # A token writes one byte at least, so a stop string that a token completes lies within so many of them.
        self._window = max((len(stop.encode()) for stop in grading.stop), default=0)

    def add(self, token: int) -> None:
        """Write one token."""
        if token in self._ends:
            self.finished = True
            return
        self.tokens.append(token)
        self.finished = len(self.tokens) == self._grading.max_new_tokens or self._stops()

    def text(self) -> str:
        """The text before the stop string."""
        return self._grading.cut(self._decoded(self.tokens))

    def _stops(self) -> bool:
        latest = self._decoded(self.tokens[-self._window :]) if self._window else ""
        # The latest tokens alone may read a little differently, so the whole text decides.
        return any(stop in latest for stop in self._grading.stop) and any(
            stop in self._decoded(self.tokens) for stop in self._grading.stop
        )

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _greedy(model: Any, states: Tensor) -> list[int]:
    """The likeliest token after each state of shape (rows, hidden).

    Raises:
        ScoringError: a logit is infinite or not a number.
    """
    # Where a family scales or caps its logits after the head, it does so monotonically, which moves no arg max.
    logits = model.get_output_embeddings()(states)
    if not logits.isfinite().all():
        raise ScoringError(
            "the model's logits are not finite; its weights are broken, or overflow in their type"
        )
    chosen: list[int] = logits.argmax(-1).tolist()
    return chosen
