"""Greedy decoding until a stop string, for many questions at once.

What all prompts begin with, such as the few-shot examples, is computed once and kept once
(`selfdev.models.shared_prefix`). The rest is batched by length, and a row that has finished leaves the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.evaluation.scoring.prompts import Prompts, behind, check_fits, padded, positions, tokenize
from selfdev.evaluation.scoring.scored import Reply, Scored, ScoringError
from selfdev.evaluation.tasks import Question
from selfdev.evaluation.tasks.grading import Grading
from selfdev.models.limits import end_tokens
from selfdev.models.shared_prefix import LayerCache, attending

ROWS = 64
"""Questions answered at once: on a CPU the cores are full well below, on a GPU memory bounds it."""
BATCH_TOKENS = 24_576
"""Tokens of keys and values that a batch may hold beside the common beginning: 1.1 GB for SmolLM2-135M."""
PREFILL_TOKENS = 2048
"""Tokens that go through the model at once while the prompts are read."""


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
        prefix = self.prompts.prefill(model)
        ends = end_tokens(model, self.tokenizer)
        texts = [""] * len(self.questions)
        with attending(model):
            for batch in self.prompts.batches(ROWS, BATCH_TOKENS, self.grading.max_new_tokens):
                rows = [_Row(self.tokenizer, self.grading, ends) for _ in batch]
                self._write(model, prefix, [self.prompts.rest[i] for i in batch], rows)
                for i, row in zip(batch, rows, strict=True):
                    texts[i] = row.text()
        return texts

    def _write(
        self, model: Any, prefix: Sequence[LayerCache], rest: Sequence[list[int]], rows: Sequence["_Row"]
    ) -> None:
        """Continue one batch until every row has finished."""
        ids, padding = padded(rest, model.device)
        width, most = ids.shape[1], self.grading.max_new_tokens
        shared = behind(prefix, len(rows), width + most, padding)
        count = len(self.prompts.shared)
        step = max(1, PREFILL_TOKENS // len(rows))
        for start in range(0, width, step):
            stop = min(start + step, width)
            logits = _forward(model, ids[:, start:stop], positions(count, start, stop, padding), shared)
        alive = list(range(len(rows)))
        for length in range(width, width + most):
            if not logits.isfinite().all():
                raise ScoringError("the model's logits are not finite; the merged weights are broken")
            chosen = logits.argmax(-1)
            going = [
                place
                for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True))
                if rows[row].add(token)
            ]
            if not going or length + 1 == width + most:
                return
            if len(going) < len(alive):
                kept = _closed_up(going)
                shared.keep(torch.tensor(kept))
                alive = [alive[place] for place in kept]
                chosen, padding = chosen[kept], padding[kept]
            logits = _forward(model, chosen[:, None], positions(count, length, length + 1, padding), shared)


class _Row:
    """What has been written to one question."""

    def __init__(self, tokenizer: Any, grading: Grading, ends: set[int]):
        self.tokens: list[int] = []
        self._tokenizer, self._grading, self._ends = tokenizer, grading, ends
        # A token writes one byte at least, so a stop string that a token completes lies within so many of them.
        self._window = max((len(stop.encode()) for stop in grading.stop), default=0)

    def add(self, token: int) -> bool:
        """Write one token; returns whether the answer goes on."""
        if token in self._ends:
            return False
        self.tokens.append(token)
        latest = self._decoded(self.tokens[-self._window :]) if self._window else ""
        # The latest tokens alone may read a little differently, so the whole text decides.
        return not (any(stop in latest for stop in self._grading.stop) and self.text() != self._whole())

    def text(self) -> str:
        """The text before the stop string."""
        return self._grading.cut(self._whole())

    def _whole(self) -> str:
        return self._decoded(self.tokens)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _forward(model: Any, ids: Tensor, position_ids: Tensor, shared: Any) -> Tensor:
    """Feed the next tokens of every row; returns the logits after the last one, shape (rows, vocabulary)."""
    out = model(ids, position_ids=position_ids, use_cache=False, shared_prefix=shared, logits_to_keep=1)
    shared.advance(ids.shape[1])
    return out.logits[:, -1]  # type: ignore[no-any-return]


def _closed_up(going: Sequence[int]) -> list[int]:
    """The places that go on, gaps filled from the end, so that few rows change theirs: [0, 2, 3] gives [0, 3, 2]."""
    count = len(going)
    stay = {place for place in going if place < count}
    late = iter(reversed([place for place in going if place >= count]))
    return [place if place in stay else next(late) for place in range(count)]
