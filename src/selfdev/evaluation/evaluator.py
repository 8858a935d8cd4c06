"""The resident evaluator: one model in memory, into which merged tensors are put and out of which the seed comes back.

Candidates are merged in the jail, human-designed methods in this process. Development questions are there from the
start; test questions come when the verdict opens them.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.algorithms.screening import REAL_TOLERANCE, Box, explained_by_combination
from selfdev.archive import Candidate, Evaluation
from selfdev.evaluation.scoring import Encoded, ScoringError, aggregate, encode, mean_by_group, score_exact
from selfdev.evaluation.tasks import Question, Seal, Task
from selfdev.merging.apply import applied
from selfdev.merging.task_vectors import TaskVectors, merge_by_method
from selfdev.models.folder import load_model, load_tokenizer
from selfdev.streams import stream_seed

DISTANCE = "distance_on_real_tensors"
"""Kept with a candidate's evaluation: how far it is from a linear combination of the real task vectors, relative."""


class Refused(Exception):
    """A candidate cannot be scored: it fails on the real tensors, or is trivial there.

    Attributes:
        status: `failed` or `trivial`.
        failure: class of the failure.
        error: what happened.
    """

    def __init__(self, status: str, failure: str, error: str):
        super().__init__(f"{failure}: {error}")
        self.status, self.failure, self.error = status, failure, error


class Scorer(Protocol):
    """What the cycle and the verdict need of an evaluator."""

    def candidate(self, candidate: Candidate, split: str) -> Evaluation: ...
    def rival(self, name: str, number: int, parameters: Mapping[str, Any], split: str) -> Evaluation: ...
    def seed(self, split: str) -> Evaluation: ...
    def questions(self, split: str) -> list[Question]: ...
    def open_test(self, count: int, seal: Seal) -> None: ...


@dataclass(frozen=True)
class _Split:
    questions: list[Question]
    encoded: Encoded


class Evaluator:
    """Scores candidates, rivals and the seed on the task.

    Args:
        folder: of the seed model.
        vectors: the experts' task vectors.
        task: gives the questions.
        development: number of development questions.
        box: where candidates run.
        seed: the run's, for the streams of candidates that draw random numbers and for the order of questions.
    """

    def __init__(self, folder: Path, vectors: TaskVectors, task: Task, development: int, box: Box, seed: int):
        self.model = load_model(folder)
        self.tokenizer = load_tokenizer(folder)
        self.vectors = vectors
        self.task = task
        self.box = box
        self.run_seed = seed
        self._splits: dict[str, _Split] = {}
        self._add("development", task.development(development, order_seed=seed))

    def open_test(self, count: int, seal: Seal) -> None:
        """Open the test split; the seal records it or raises."""
        self._add("test", self.task.open_test(count, seal))

    def questions(self, split: str) -> list[Question]:
        """The questions of a split that is open, in the order of every outcome."""
        return self._splits[split].questions

    def seed(self, split: str = "development") -> Evaluation:
        """Score the seed as it is."""
        return self._evaluation("seed", "seed", 0, split, {}, None)

    def rival(
        self, name: str, number: int, parameters: Mapping[str, Any], split: str = "development"
    ) -> Evaluation:
        """Score a human-designed method with one setting of its parameters."""
        began = time.perf_counter()
        merged = merge_by_method(method(name), self.vectors, dict(parameters))
        return self._evaluation("rival", name, number, split, parameters, merged, began)

    def candidate(self, candidate: Candidate, split: str = "development") -> Evaluation:
        """Merge a candidate in the jail and score it.

        Raises:
            Refused: it fails on the real tensors, or is a constant linear combination of them.
        """
        began = time.perf_counter()
        merged = self.merge(candidate)
        distance = explained_by_combination(merged, self.vectors.vectors)
        if distance <= REAL_TOLERANCE:
            raise Refused("trivial", "", f"on the real tensors a linear combination, to {distance:.1e}")
        facts = {DISTANCE: float(f"{distance:.4g}")}
        return self._evaluation("candidate", candidate.name, 0, split, facts, merged, began)

    def merge(self, candidate: Candidate) -> dict[str, Tensor]:
        """Run a candidate in the jail on every selected tensor.

        Returns:
            Parameter name -> merged task vector.

        Raises:
            Refused: it fails on one of them.
        """
        names = list(self.vectors.vectors)
        seeds = [
            stream_seed(self.run_seed, "merge", candidate.iteration, candidate.number, name) for name in names
        ]
        outcomes = self.box.merge_many(
            candidate.source or "", [self.vectors.vectors[name] for name in names], seeds=seeds
        )
        merged = {}
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome.tensor is None:
                raise Refused("failed", outcome.failure, f"on tensor {name}: {outcome.error}")
            merged[name] = outcome.tensor
        return merged

    def _add(self, split: str, questions: list[Question]) -> None:
        self._splits[split] = _Split(questions, encode(self.tokenizer, questions))

    def _evaluation(
        self,
        kind: str,
        subject: str,
        number: int,
        split: str,
        parameters: Mapping[str, Any],
        merged: Mapping[str, Tensor] | None,
        began: float | None = None,
    ) -> Evaluation:
        began = time.perf_counter() if began is None else began
        part = self._splits[split]
        count = len(part.questions)
        try:
            right = self._outcomes(part.encoded, merged)
        except ScoringError as error:
            seconds = time.perf_counter() - began
            return Evaluation(
                kind, subject, number, split, None, None, count, parameters, f"ScoringError: {error}", seconds
            )
        score = aggregate(mean_by_group(part.questions, right))
        outcomes = tuple(bool(r) for r in right.tolist())
        seconds = time.perf_counter() - began
        return Evaluation(kind, subject, number, split, outcomes, score, count, parameters, None, seconds)

    def _outcomes(self, encoded: Encoded, merged: Mapping[str, Tensor] | None) -> Tensor:
        if merged is None:
            return score_exact(self.model, encoded)
        if not all(torch.isfinite(tensor).all() for tensor in merged.values()):
            raise ScoringError("the merged task vector is not finite")
        with applied(self.model, self.vectors, merged):
            return score_exact(self.model, encoded)
