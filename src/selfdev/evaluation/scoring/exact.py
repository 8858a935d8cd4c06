"""Exact-match scores of a causal language model, in one forward pass.

Greedy decoding writes the gold answer and stops exactly if, with the gold answer fed in, the arg max at every
answer position is the gold token, and after it an end token or a token that begins with a stop string. So a short
answer costs one pass and not one pass a token. This holds only where the answer can be written in one way, which
`encode` checks: a tokenizer that cannot promise it is refused.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdev.errors import UserError
from selfdev.evaluation.scoring.scored import ScoringError
from selfdev.evaluation.tasks import Question

BATCH_TOKENS = 4096
"""Tokens in one forward pass: large enough to fill the cores, small enough to stay in the cache."""


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
    """The answer tokens, each answer's end token included, shape (n,). It stands for every way to end."""


@dataclass(frozen=True)
class Encoded:
    """Questions as tensors, made once and used for every candidate."""

    count: int
    lengths: tuple[int, ...]
    """Tokens of each question and its answer, the end left out."""
    batches: tuple[Batch, ...]
    end: int
    """The tokenizer's end token."""
    ends: Tensor
    """All tokens that end an answer: the end tokens, and those that begin with a stop string; shape (ends,)."""


def encode(
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    stop: Sequence[str] = (),
    ends: Collection[int] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> Encoded:
    """Turn questions into batches sorted by length.

    Args:
        tokenizer: a tokenizer of transformers, with an end-of-sequence token.
        questions: at least one.
        stop: strings of one character that end an answer.
        ends: tokens that end it, beside the tokenizer's end token.
        batch_tokens: the most tokens of one forward pass, padding included; one question may exceed it.

    Raises:
        UserError: the tokenizer has no end token, does not know a character, or can write an answer in
            several ways, so that one pass would not equal greedy decoding.
    """
    if not questions:
        raise UserError("there is no question to score; ask for at least one")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which ends an answer; set its eos_token")
    prompts = tokenizer([q.text for q in questions])["input_ids"]
    answers = tokenizer([q.gold for q in questions], add_special_tokens=False)["input_ids"]
    _refuse_unknown(
        tokenizer, questions, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    )
    pieces = _pieces(tokenizer)
    _refuse_ambiguous(pieces, {question.gold for question in questions}, stop)

    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batches, pending = [], list[int]()
    for i in sorted(range(len(questions)), key=lengths.__getitem__):
        if pending and (len(pending) + 1) * lengths[i] > batch_tokens:
            batches.append(_batch(pending, prompts, answers, tokenizer.eos_token_id))
            pending = []
        pending.append(i)
    batches.append(_batch(pending, prompts, answers, tokenizer.eos_token_id))
    stopping = [token for first in stop for token, _ in pieces.get(first, [])]
    every_end = torch.tensor(sorted({tokenizer.eos_token_id, *ends, *stopping}))
    return Encoded(len(questions), tuple(lengths), tuple(batches), tokenizer.eos_token_id, every_end)


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
            raise ScoringError(
                "the model's logits are not finite; its weights are broken, or overflow in their type"
            )
        written = logits.argmax(-1).cpu()
        ended = (batch.gold == encoded.end) & torch.isin(written, encoded.ends)
        wrong = batch.row[(written != batch.gold) & ~ended]
        right[batch.questions[wrong]] = False
    return right


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
                f"question '{question.prompt}{question.gold}' holds a character that the tokenizer does "
                "not know; use the tokenizer of a model that was made for this task"
            )


def _pieces(tokenizer: Any) -> dict[str, list[tuple[int, str]]]:
    """Every ordinary token and what it writes, by its first character."""
    pieces: dict[str, list[tuple[int, str]]] = {}
    for token in sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)):
        piece = tokenizer.decode([token])
        pieces.setdefault(piece[:1], []).append((token, piece))
    return pieces


def _refuse_ambiguous(
    pieces: dict[str, list[tuple[int, str]]], answers: Collection[str], stop: Sequence[str]
) -> None:
    """Raise unless each answer can be spelt in one way only, so that greedy decoding has no other.

    A token that holds the end of the answer and the stop string after it is one more way.
    """
    for answer in answers:
        ways = [0] * len(answer) + [1]  # ways[i]: in how many ways the tokens spell answer[i:]
        for i in range(len(answer) - 1, -1, -1):
            rest = answer[i:]
            for _, piece in pieces.get(answer[i], []):
                if rest.startswith(piece):
                    ways[i] += ways[i + len(piece)]
                elif stop and piece.startswith(tuple(rest + each for each in stop)):
                    ways[i] += 1
        if ways[0] != 1:
            raise UserError(
                f"answer '{answer}' can be written in {ways[0]} ways with this tokenizer's tokens, and exact "
                "scoring needs one; use a tokenizer with a token for each character, or score by generation"
            )
