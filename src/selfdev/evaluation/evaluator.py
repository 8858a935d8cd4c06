"""The resident evaluator: one model in memory, into which merged tensors are put and out of which the seed comes back.

Candidates are merged in the jail, human-designed methods in this process. Development questions are there from the
start; test questions come when the verdict opens them.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.algorithms.screening import REAL_TOLERANCE, Box, explained_by_combination
from selfdev.archive import DISTANCE, FACTOR, ORDER, Archive, Candidate, Evaluation, TestSealed
from selfdev.errors import SelfdevError, UserError
from selfdev.evaluation.objective import Objective
from selfdev.evaluation.scoring import Scoring, ScoringError, prepare
from selfdev.evaluation.tasks import Question, Seal, Task
from selfdev.merging.apply import applied
from selfdev.merging.task_vectors import TaskVectors, merge_by_method
from selfdev.models.device import ON_CPU, Place
from selfdev.models.folder import load_model, load_tokenizer
from selfdev.streams import stream_seed

KEPT_BYTES = 512 * 1024**2
"""Merged task vectors that stay in memory for the next questions of a race. What does not fit is merged again, which
gives the same tensors: a candidate's random streams are its own."""

TRIES = 3
"""How often a program is run that has run before, until it is said to fail."""


class Refused(Exception):
    """A candidate cannot be scored: it fails on the real tensors.

    Attributes:
        failure: class of the failure.
        error: what happened.
    """

    def __init__(self, failure: str, error: str):
        super().__init__(f"{failure}: {error}")
        self.failure, self.error = failure, error


class Trivial(Refused):
    """A candidate is a constant linear combination of the real task vectors."""


class Scorer(Protocol):
    """What the cycle and the verdict need of an evaluator."""

    def candidate(
        self,
        candidate: Candidate,
        split: str,
        asked: Sequence[int] | None = None,
        *,
        number: int = 0,
        factor: float = 1.0,
        norm: float | None = None,
    ) -> Evaluation: ...
    def rival(self, name: str, number: int, parameters: Mapping[str, Any], split: str) -> Evaluation: ...
    def seed(self, split: str) -> Evaluation: ...
    def questions(self, split: str) -> list[Question]: ...
    def families(self, split: str) -> list[Hashable]: ...
    def open_test(self, count: int, seal: Seal) -> None: ...


def score_again(
    scorer: Scorer,
    candidate: Candidate,
    split: str,
    number: int,
    factor: float = 1.0,
    norm: float | None = None,
) -> Evaluation:
    """Score a candidate that has been scored before; where that fails again, the evaluation says so and has no score.

    If it ran on these very tensors, a failure tells of a machine in trouble and is no verdict on the program, so it is
    tried again; on the tensors of a transfer it may be one.
    """
    for _ in range(TRIES):
        try:
            return scorer.candidate(candidate, split, number=number, factor=factor, norm=norm)
        except Refused as refused:
            failure = f"Refused: {refused}"
    kind, count = "scaled" if number else "candidate", len(scorer.questions(split))
    facts = {FACTOR: factor} if number else {}
    return Evaluation(kind, candidate.name, number, split, None, None, count, facts, failure)


@dataclass(frozen=True)
class _Split:
    questions: list[Question]
    scoring: Scoring


class Evaluator:
    """Scores candidates, rivals and the seed on the task.

    Args:
        folder: of the seed model.
        vectors: the experts' task vectors.
        task: gives the questions.
        development: number of development questions.
        box: where candidates run.
        seed: the run's, for the streams of candidates that draw random numbers and for the order of questions.
        objective: what the groups' scores come to; by default their mean.
        without: ids of questions that were asked before; these and their rewordings are asked in no split.
        place: where the model computes.
    """

    def __init__(
        self,
        folder: Path,
        vectors: TaskVectors,
        task: Task,
        development: int,
        box: Box,
        seed: int,
        objective: Objective | None = None,
        without: Collection[str] = frozenset(),
        place: Place = ON_CPU,
    ):
        self.model = load_model(folder, place.dtype).to(place.device)
        _check_names(self.model, vectors)
        self.tokenizer = load_tokenizer(folder)
        self.vectors = vectors
        self.task = task
        self.box = box
        self.run_seed = seed
        self.objective = objective or Objective()
        self.without = without
        self._splits: dict[str, _Split] = {}
        self._part: tuple[tuple[str, tuple[int, ...]], _Split] | None = None
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._notes: dict[str, dict[str, float]] = {}
        self._mean_norm = norm_of(torch.stack(list(v.values())).mean(0) for v in vectors.vectors.values())
        self._add("development", task.development(development, seed, without))

    def check_test(self, count: int) -> None:
        """Raise UserError if a test question cannot be asked, such as one too long; nothing of them is kept."""
        self.task.check_test(count, self._prepared, self.without)

    def open_test(self, count: int, seal: Seal) -> None:
        """Open the test split; the seal records it or raises."""
        self._add("test", self.task.open_test(count, seal, self.without))

    def questions(self, split: str) -> list[Question]:
        """The questions of a split that is open, in the order of every outcome.

        Raises:
            TestSealed: the split is not open.
        """
        return self._open(split).questions

    def families(self, split: str) -> list[Hashable]:
        """Of each question of `questions`, what it and its rewordings have in common."""
        return self.task.families(self.questions(split))

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

    def candidate(
        self,
        candidate: Candidate,
        split: str = "development",
        asked: Sequence[int] | None = None,
        *,
        number: int = 0,
        factor: float = 1.0,
        norm: float | None = None,
    ) -> Evaluation:
        """Merge a candidate in the jail and score it.

        Args:
            candidate: that works.
            split: `development`, or `test` once it is open.
            asked: positions of the questions to ask, in this order; all by default.
            number: of the scale, if it is not scored as it was written; 0 otherwise.
            factor: what its merged task vector is multiplied by.
            norm: what its merged task vector is brought to instead, in norms of the mean task vector, above 0; the
                factor that does it is archived.

        Raises:
            Refused: it fails on the real tensors.
            Trivial: it is a linear combination of them, and would be scored as new: as it was written, on development.
        """
        began = time.perf_counter()
        merged = self._merged(candidate)
        facts = self._noted(candidate, merged)
        if number == 0 and split == "development" and facts[DISTANCE] <= REAL_TOLERANCE:
            raise Trivial("", f"on the real tensors a linear combination, to {facts[DISTANCE]:.1e}")
        if number == 0:
            return self._evaluation("candidate", candidate.name, 0, split, facts, merged, began, asked)
        if norm is not None:
            factor = norm * self._mean_norm / norm_of(merged.values())
        facts = {DISTANCE: facts[DISTANCE], FACTOR: factor}
        return self._evaluation("scaled", candidate.name, number, split, facts, merged, began, asked, factor)

    def merge(self, candidate: Candidate) -> dict[str, Tensor]:
        """Run a candidate in the jail on every selected tensor.

        Returns:
            Parameter name -> merged task vector.

        Raises:
            Refused: it fails on one of them.
        """
        names = list(self.vectors.vectors)
        outcomes = self.box.merge_many(
            candidate.source or "",
            [self.vectors.vectors[name] for name in names],
            contexts=[self.vectors.context(name) for name in names],
            seeds=[self._stream(candidate, name) for name in names],
        )
        merged = {}
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome.tensor is None:
                raise Refused(outcome.failure, f"on tensor {name}: {outcome.error}")
            merged[name] = outcome.tensor
        return merged

    def _stream(self, candidate: Candidate, name: str) -> int:
        return stream_seed(self.run_seed, "merge", candidate.iteration, candidate.number, name)

    def _change_by_order(self, candidate: Candidate, merged: Mapping[str, Tensor]) -> float:
        """How much the output changes if the experts change places, as a share of its norm; on the smallest matrix.

        A program that treats them by their order may owe its score to the order that they happen to have here, and
        loses it on other experts. One that fails in another order changes by all of its output.
        """
        name = min(merged, key=lambda each: (merged[each].dim() < 2, merged[each].numel()))
        first, *others = self.vectors.vectors[name].items()
        [turned] = self.box.merge_many(
            candidate.source or "",
            [dict([*others, first])],
            contexts=[self.vectors.context(name)],
            seeds=[self._stream(candidate, name)],
        )
        if turned.tensor is None:
            return 1.0
        return norm_of([turned.tensor - merged[name]]) / max(norm_of([merged[name]]), 1e-30)

    def _noted(self, candidate: Candidate, merged: Mapping[str, Tensor]) -> dict[str, float]:
        """What is noted of a program beside its scores: found out once, since a race asks for those many times."""
        if candidate.name not in self._notes:
            found = {
                DISTANCE: explained_by_combination(merged, self.vectors.vectors),
                ORDER: self._change_by_order(candidate, merged),
            }
            self._notes[candidate.name] = {key: float(f"{value:.4g}") for key, value in found.items()}
        return self._notes[candidate.name]

    def _merged(self, candidate: Candidate) -> dict[str, Tensor]:
        """What `merge` returns, kept as long as there is room."""
        if candidate.name in self._kept:
            self._kept.move_to_end(candidate.name)
            return self._kept[candidate.name]
        merged = self._kept[candidate.name] = self.merge(candidate)
        held = sum(t.nbytes for each in self._kept.values() for t in each.values())
        while held > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            held -= sum(t.nbytes for t in oldest.values())
        return merged

    def _asked(self, split: str, asked: Sequence[int] | None) -> _Split:
        """The questions to ask; those of one prefix stay encoded, since many candidates in turn are asked them."""
        whole = self._open(split)
        if asked is None:
            return whole
        key = split, tuple(asked)
        if self._part is None or self._part[0] != key:
            questions = [whole.questions[position] for position in asked]
            self._part = key, _Split(questions, self._prepared(questions))
        return self._part[1]

    def _open(self, split: str) -> _Split:
        if split not in self._splits:
            raise TestSealed(
                f"the {split} split of task '{self.task.name}' is not open; the verdict opens it"
            )
        return self._splits[split]

    def _prepared(self, questions: Sequence[Question]) -> Scoring:
        return prepare(self.model, self.tokenizer, questions, self.task.grading)

    def _add(self, split: str, questions: list[Question]) -> None:
        self._splits[split] = _Split(questions, self._prepared(questions))

    def _evaluation(
        self,
        kind: str,
        subject: str,
        number: int,
        split: str,
        parameters: Mapping[str, Any],
        merged: Mapping[str, Tensor] | None,
        began: float | None = None,
        asked: Sequence[int] | None = None,
        factor: float = 1.0,
    ) -> Evaluation:
        began = time.perf_counter() if began is None else began
        part = self._asked(split, asked)
        count = len(part.questions)
        try:
            right = self._outcomes(part.scoring, merged, factor)
        except ScoringError as error:
            seconds = time.perf_counter() - began
            return Evaluation(
                kind, subject, number, split, None, None, count, parameters, f"ScoringError: {error}", seconds
            )
        outcomes = tuple(right.tolist())
        score = self.objective.score([question.group for question in part.questions], outcomes)
        seconds = time.perf_counter() - began
        positions = None if asked is None else tuple(asked)
        return Evaluation(
            kind, subject, number, split, outcomes, score, count, parameters, None, seconds, positions
        )

    def _outcomes(self, scoring: Scoring, merged: Mapping[str, Tensor] | None, factor: float) -> Tensor:
        try:
            return self._scored(scoring, merged, factor)
        except torch.OutOfMemoryError as error:
            raise SelfdevError(
                f"scoring: {str(error).splitlines()[0]} Free memory on the GPU and resume, or begin a run with "
                "task.dtype: bfloat16 or task.device: cpu"
            ) from error

    def _scored(self, scoring: Scoring, merged: Mapping[str, Tensor] | None, factor: float) -> Tensor:
        if merged is None:
            return scoring(self.model).outcomes
        if not all(torch.isfinite(factor * tensor).all() for tensor in merged.values()):
            raise ScoringError("the merged task vector is not finite")
        with applied(self.model, self.vectors, merged, factor):
            return scoring(self.model).outcomes


def _check_names(model: Any, vectors: TaskVectors) -> None:
    """Raise UserError unless every tensor that is merged is a parameter of the model, in this shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in vectors.seed.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(
                f"merge.targets: '{name}' of the seed's files is no parameter of a {type(model).__name__} as "
                "transformers loads it, which fuses or renames some; choose targets without it, or save the models "
                "anew with save_pretrained"
            )


def score_seed(archive: Archive, scorer: Scorer) -> None:
    """Fix the development questions, and score the seed on them, unless that is done.

    Raises:
        UserError: it cannot be scored, so nothing could be compared with it.
    """
    archive.set_questions("development", [(q.id, q.group) for q in scorer.questions("development")])
    if archive.evaluations("seed"):
        return
    found = scorer.seed("development")
    if found.failure is not None:
        raise UserError(
            f"the seed cannot be scored, and so nothing compared with it: {found.failure}. If task.dtype is float16, "
            "which many models overflow, set bfloat16 or float32; else the seed is broken"
        )
    archive.add_evaluation(found)


def norm_of(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of several tensors taken as one vector."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
