"""What the archive holds, one frozen record a table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """The run itself.

    Attributes:
        name: of the run's folder.
        preset: which preset or file it came from.
        seed: of all its random streams.
        status: `running`, `verdict` (the test split may be opened) or `done`.
        config: complete, as JSON values.
        facts: hashes of weights and versions of libraries.
        created: ISO 8601, UTC.
        seconds: spent in all sessions.
    """

    name: str
    preset: str
    seed: int
    status: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    created: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Iteration:
    """One iteration of one arm, once its programs are written; `seconds` went into that.

    `prompts` are texts, those of a repair turn after the usual ones; each of them begins with the usual one that it was
    made from.
    """

    arm: str
    iteration: int
    temperature: float
    prompts: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """One program and all that is known of it; the columns of the table `candidate`.

    `status` is None until it is screened, then `failed` (with `failure` and `error`), `trivial`, `known`,
    `repeated` or `new`. `source` is None where no function could be read. `log_prob` is of the tokens at
    temperature 1, in nats, `log_probs` of each of them; None where nobody told. `seconds` is what its writing took,
    beside others, `screening` what its screening took; None where nobody looked.
    """

    name: str
    arm: str
    iteration: int
    number: int
    prompt: int
    text: str
    tokens: tuple[int, ...] = ()
    log_prob: float | None = None
    finished: bool = True
    source: str | None = None
    status: str | None = None
    failure: str | None = None
    error: str | None = None
    canonical: str | None = None
    behaviour: bytes | None = field(default=None, repr=False)
    nearest: str | None = None
    distance: float | None = None
    log_probs: tuple[float, ...] | None = field(default=None, repr=False)
    seconds: float | None = field(default=None, compare=False)
    screening: float | None = field(default=None, compare=False)

    @property
    def cut_off(self) -> bool:
        """Whether the limit on new tokens ended it, maybe in thoughts that are no text.

        What a server refused to write took no time.
        """
        return not self.finished and (bool(self.text) or self.seconds is not None)

    @property
    def works(self) -> bool:
        """Whether it ran on every probe."""
        return self.status is not None and self.status != "failed"


FACTOR = "factor"
"""Among the parameters of a `scaled` evaluation."""

DISTANCE = "distance_on_real_tensors"
"""Kept with a candidate's evaluation: how far it is from a linear combination of the real task vectors, relative."""

ORDER = "change_by_order"
"""Kept with it too: how much its output changes if the experts change places, relative."""


@dataclass(frozen=True)
class Evaluation:
    """One merged model on the questions of one split.

    Attributes:
        kind: `seed`, `rival`, `candidate`, or `scaled`: a candidate whose merged task vector is multiplied by a factor.
        subject: `seed`, or the name of the method or candidate.
        number: which of a rival's settings, or which factor; 0 for the others.
        split: `development` or `test`.
        outcomes: right or wrong for every question, or how right; None with a failure.
        score: in 0..1; None with a failure.
        questions: how many questions the score rests on.
        parameters: of a rival; of a candidate what was measured beside the score.
        failure: class of the failure, if it failed.
        seconds: merging and scoring.
        asked: the questions of these outcomes, as positions in the archived order; None if it was asked all of them
            in that order.
        first_questions: of one that raced, how many questions every entrant answered; None without a race.
        first_score: its score on these.
    """

    kind: str
    subject: str
    number: int
    split: str
    outcomes: tuple[float, ...] | None
    score: float | None
    questions: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0
    asked: tuple[int, ...] | None = None
    first_questions: int | None = None
    first_score: float | None = None

    @property
    def factor(self) -> float:
        """What the merged task vector was multiplied by."""
        return float(self.parameters.get(FACTOR, 1.0))

    @property
    def score_on_first(self) -> float | None:
        """The score on the questions that all of its iteration answered: what the worst and the mean are taken from."""
        return self.score if self.first_questions is None else self.first_score


def in_nats(scores: Iterable[float | None]) -> bool:
    """Whether scores are log-likelihoods, which are below 0, and no shares of right answers."""
    return any((score or 0.0) < 0 for score in scores)


@dataclass(frozen=True)
class Pair:
    """A preference: names of two candidates, and why the second is rejected."""

    chosen: str
    rejected: str
    reason: str


@dataclass(frozen=True)
class Refinement:
    """One round of training; `adapter` is a folder within the run, None if the round was skipped."""

    arm: str
    iteration: int
    adapter: str | None
    facts: Mapping[str, Any]
    seconds: float

    @property
    def why_nothing(self) -> str | None:
        """Why nothing was learned: the round was skipped, or rolled back; None where an adapter came of it."""
        reason: str | None = self.facts.get("skipped") or self.facts.get("rolled_back")
        return reason


@dataclass(frozen=True)
class Opening:
    """One opening of the test split.

    Attributes:
        opened: ISO 8601, UTC.
        again: whether a verdict stood already, and `--again` took it back.
        before: the result of that verdict.
    """

    opened: str
    again: bool = False
    before: Mapping[str, Any] | None = None
