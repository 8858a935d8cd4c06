"""Exact-match scores of a causal language model, in one forward pass.

Greedy decoding writes the gold answer and stops exactly if, with the gold answer fed in, the arg max at every
answer position is the gold token, the end token included. So a short answer costs one pass and not one pass a
token. This holds only where the answer can be written in one way, which `encode` checks: a tokenizer that
cannot promise it is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.errors import SelfdevError, UserError
from selfdev.evaluation.tasks import Question

BATCH_TOKENS = 4096
"""Tokens in one forward pass: large enough to fill the cores, small enough to stay in the cache."""


class ScoringError(SelfdevError):
    """The model gives no usable logits: a failure of the model, never a score of zero."""


@dataclass(frozen=True)
class Batch:
    """Questions of similar length, padded on the right. `n` is the number of answer tokens of all of them."""

    questions: Tensor
    """Which of the encoded questions each row is, shape (rows,)."""
    input_ids: Tensor
    """Prompt and answer without the end token, shape (rows, longest)."""
    row: Tensor
    """The row of each answer token, shape (n,)."""
    position: Tensor
    """The position whose logits must name it, which is the one before it, shape (n,)."""
    gold: Tensor
    """The answer tokens, each answer's end token included, shape (n,)."""


@dataclass(frozen=True)
class Encoded:
    """Questions as tensors, made once and used for every candidate."""

    count: int
    batches: tuple[Batch, ...]


def encode(tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int = BATCH_TOKENS) -> Encoded:
    """Turn questions into batches sorted by length.

    Args:
        tokenizer: a tokenizer of transformers, with an end-of-sequence token.
        questions: at least one.
        batch_tokens: the most tokens of one forward pass, padding included; one question may exceed it.

    Raises:
        UserError: the tokenizer has no end token, does not know a character, or can write an answer in
            several ways, so that one pass would not equal greedy decoding.
    """
    if not questions:
        raise UserError("there is no question to score; ask for at least one")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which ends an answer; set its eos_token")
    prompts = tokenizer([q.prompt for q in questions])["input_ids"]
    answers = tokenizer([q.answer for q in questions], add_special_tokens=False)["input_ids"]
    _refuse_unknown(
        tokenizer, questions, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    )
    _refuse_ambiguous(tokenizer, {question.answer for question in questions})

    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batches, pending = [], list[int]()
    for i in sorted(range(len(questions)), key=lengths.__getitem__):
        if pending and (len(pending) + 1) * lengths[i] > batch_tokens:
            batches.append(_batch(pending, prompts, answers, tokenizer.eos_token_id))
            pending = []
        pending.append(i)
    batches.append(_batch(pending, prompts, answers, tokenizer.eos_token_id))
    return Encoded(len(questions), tuple(batches))


@torch.inference_mode()
def score_exact(model: Any, encoded: Encoded) -> Tensor:
    """Which questions the model answers exactly right by greedy decoding.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        encoded: what `encode` made with the model's tokenizer.

    Returns:
        One truth value for each question, in the order of `encode`, shape (questions,), bool, on the CPU.

    Raises:
        ScoringError: a logit is infinite or not a number.
    """
    body, head = model.base_model, model.get_output_embeddings()
    right = torch.ones(encoded.count, dtype=torch.bool)
    for batch in encoded.batches:
        # No attention mask: padding is on the right, where a causal model's answers cannot see it.
        hidden = body(input_ids=batch.input_ids.to(model.device), use_cache=False).last_hidden_state
        # The head runs on answer positions alone. Where a family scales or caps its logits after the head, it
        # does so monotonically, which moves no arg max.
        logits = head(hidden[batch.row.to(model.device), batch.position.to(model.device)])
        if not logits.isfinite().all():
            raise ScoringError("the model's logits are not finite; the merged weights are broken")
        wrong = batch.row[logits.argmax(-1).cpu() != batch.gold]
        right[batch.questions[wrong]] = False
    return right


def mean_by_group(questions: Sequence[Question], right: Tensor) -> dict[str, float]:
    """The share of right answers in each group, in 0..1; groups in the order of their first question."""
    outcomes: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right.tolist(), strict=True):
        outcomes.setdefault(question.group, []).append(is_right)
    return {group: sum(each) / len(each) for group, each in outcomes.items()}


def aggregate(by_group: Mapping[str, float]) -> float:
    """The score of a model: the unweighted mean over its groups, in 0..1."""
    return sum(by_group.values()) / len(by_group)


def _batch(
    rows: Sequence[int], prompts: Sequence[list[int]], answers: Sequence[list[int]], end: int
) -> Batch:
    longest = max(len(prompts[i]) + len(answers[i]) for i in rows)
    # Padding is never seen by an answer, so any token serves.
    input_ids = torch.full((len(rows), longest), end)
    row, position, gold = list[int](), list[int](), list[int]()
    for r, i in enumerate(rows):
        input_ids[r, : len(prompts[i]) + len(answers[i])] = torch.tensor(prompts[i] + answers[i])
        count = len(answers[i]) + 1
        row += [r] * count
        position += range(len(prompts[i]) - 1, len(prompts[i]) - 1 + count)
        gold += [*answers[i], end]
    return Batch(torch.tensor(rows), input_ids, torch.tensor(row), torch.tensor(position), torch.tensor(gold))


def _refuse_unknown(tokenizer: Any, questions: Sequence[Question], encoded: Sequence[list[int]]) -> None:
    """Raise if a question or an answer holds something that the tokenizer has no token for."""
    for question, ids in zip(questions, encoded, strict=True):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise UserError(
                f"question '{question.prompt}{question.answer}' holds a character that the tokenizer does "
                "not know; use the tokenizer of a model that was made for this task"
            )


def _refuse_ambiguous(tokenizer: Any, answers: Collection[str]) -> None:
    """Raise unless each answer can be spelt in one way only, so that greedy decoding has no other."""
    pieces: dict[str, list[str]] = {}  # what each ordinary token writes, by its first character
    for token in set(range(len(tokenizer))) - set(tokenizer.all_special_ids):
        piece = tokenizer.decode([token])
        pieces.setdefault(piece[:1], []).append(piece)
    for answer in answers:
        ways = [0] * len(answer) + [1]  # ways[i]: in how many ways the tokens spell answer[i:]
        for i in range(len(answer) - 1, -1, -1):
            ways[i] = sum(ways[i + len(p)] for p in pieces.get(answer[i], []) if answer.startswith(p, i))
        if ways[0] != 1:
            raise UserError(
                f"answer '{answer}' can be written in {ways[0]} ways with this tokenizer's tokens, and exact "
                "scoring needs one; use a tokenizer with a token for each character, or score by generation"
            )
