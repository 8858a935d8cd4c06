"""Live progress of a run: what is happening, how far, at what yield, and who leads.

On a terminal a display that stays at the bottom, with a line above it for every phase that is over. Else, as
in the log of a CI job, plain lines alone: one when a phase begins and one when it ends.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from selfdev.algorithms.screening import Novelty
from selfdev.archive import Candidate, Evaluation, in_nats
from selfdev.config import Config
from selfdev.evaluation.rivals import best_rival
from selfdev.evaluation.standing import LEARNING, ranked_new
from selfdev.report.terminal import Terminal, duration, percent, table, visible
from selfdev.watcher import Tick

if TYPE_CHECKING:
    from selfdev.results import Run

STATUSES = tuple(map(str, Novelty))
"""What a working program can be, in the order in which it is shown."""

_REFRESHES = 4
"""A second. More would take time from the work: there are two cores."""


class Progress:
    """Watches a cycle (`selfdev.watcher.Watcher`) and shows it while it is entered.

    Args:
        terminal: where.
        config: the run's.
    """

    def __init__(self, terminal: Terminal, config: Config):
        self.terminal = terminal
        self.config = config
        self._began = time.monotonic()
        self._phase: _Phase | None = None
        self._written: Counter[tuple[str, int]] = Counter()
        self._found: dict[tuple[str, int], Counter[str]] = {}
        self._best: dict[str, Evaluation] = {}
        self._rival: Evaluation | None = None
        self._live: Live | None = None
        self._log = _Log(self)

    def __enter__(self) -> "Progress":
        """Begin to show."""
        if self.terminal.interactive:
            self._live = Live(
                console=self.terminal.console,
                get_renderable=lambda: self.terminal.marked(self.display()),
                refresh_per_second=_REFRESHES,
                transient=True,
            )
            self._live.start(refresh=True)
        logger = logging.getLogger("selfdev")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self._log)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the display away; the lines above it stay."""
        logger = logging.getLogger("selfdev")
        logger.removeHandler(self._log)
        logger.setLevel(self._level)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def recall(self, run: "Run") -> None:
        """Take up what a run that goes on has done before."""
        for candidate in run.candidates():
            self._written[candidate.arm, candidate.iteration] += 1
            if candidate.status is not None:
                self.screened(candidate, None)
        for arm in (LEARNING, *self.config.controls):
            for _, evaluation in ranked_new(run.archive, arm)[:1]:
                self.scored(evaluation)
        self._rival = best_rival(run.archive)

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        """Show a phase until it is left; one that fails is not said to be over."""
        phase = self._phase = _Phase(self._title(name, arm, iteration), name, arm, iteration)
        if self._live is None:
            self._line(f"{phase.title} ...")
        try:
            yield phase
        finally:
            phase.seconds = time.monotonic() - phase.began
            self._phase = None
        if name == "write" and arm is not None and iteration is not None:
            self._written[arm, iteration] = self.config.budgets[iteration]
        self._line(f"{phase.title}: {self._end(phase)}, {duration(phase.seconds)}")

    def screened(self, candidate: Candidate, evaluation: Evaluation | None) -> None:
        """Count what a candidate is, and remember the best."""
        found = self._found.setdefault((candidate.arm, candidate.iteration), Counter())
        found[candidate.status or "failed"] += 1
        if candidate.status == "new" and evaluation is not None:
            self.scored(evaluation)

    def scored(self, evaluation: Evaluation) -> None:
        """Remember the best."""
        arm = evaluation.subject.partition("/")[0]
        best = self._best.get(arm)
        if evaluation.score is not None and (best is None or evaluation.score > (best.score or 0.0)):
            self._best[arm] = evaluation

    def rival(self, best: Evaluation | None) -> None:
        """Remember the best rival."""
        self._rival = best

    def display(self) -> RenderableType:
        """The display as it stands."""
        head = Text.assemble(
            (self.config.name, "bold"),
            f", seed {self.config.seed}, {duration(time.monotonic() - self._began)}",
        )
        parts: list[RenderableType] = [head]
        if self._phase is not None:
            parts.append(self._phase.row())
        if self._written or self._found:
            parts.append(self._yield())
        if self._best or self._rival:
            parts.append(Text(self._lead()))
        return Group(*parts)

    def _yield(self) -> RenderableType:
        rows = table("", "written", "working", *STATUSES, "best new")
        for arm in (LEARNING, *self.config.controls):
            found = sum((count for (a, _), count in self._found.items() if a == arm), Counter())
            written = sum(count for (a, _), count in self._written.items() if a == arm)
            phase = self._phase
            if phase is not None and phase.name == "write" and phase.arm == arm:
                written += phase.done
            best = self._best.get(arm)
            rows.add_row(
                arm,
                str(written),
                str(sum(found[status] for status in STATUSES)),
                *(str(found[status]) for status in STATUSES),
                percent(None if best is None else best.score),
            )
        return rows

    def _lead(self) -> str:
        best, rival = self._best.get(LEARNING), self._rival
        against = "best rival: " + ("none tuned yet" if rival is None else _scored(rival))
        if not self._found:  # a transfer scores no program on development
            return against
        found = "nothing new" if best is None else _scored(best)
        return f"best on development so far: {found}; {against}"

    def _title(self, name: str, arm: str | None, iteration: int | None) -> str:
        if arm is None:
            return name
        if iteration is None:
            return f"{name} {arm}"
        title = f"{name} {arm} {iteration + 1}/{self.config.iterations}"
        if name == "write":
            title += f" at T={self.config.factory.temperature_at(iteration):.2f}"
        return title

    def _end(self, phase: "_Phase") -> str:
        """What a phase that is over has come to."""
        if phase.name == "judge" and phase.arm is not None and phase.iteration is not None:
            found = self._found.get((phase.arm, phase.iteration), Counter())
            working = sum(found[status] for status in STATUSES)
            kinds = ", ".join(f"{found[status]} {status}" for status in STATUSES)
            return f"{working} of {self._written[phase.arm, phase.iteration]} work ({kinds})"
        if phase.name == "write" and phase.arm is not None and phase.iteration is not None:
            return f"{self._written[phase.arm, phase.iteration]} programs"
        if phase.name == "warm start" and not phase.total:
            return "in the cache" if self.config.factory.warm_start.steps else "none"
        if phase.name == "rivals":
            return self._lead()
        return phase.note or "done"

    def _line(self, line: str) -> None:
        self.terminal.say(Text(f"[{duration(time.monotonic() - self._began)}] {visible(line)}"))


def _scored(evaluation: Evaluation) -> str:
    """Who it is, and the score on development: a share of right answers, or a log-likelihood."""
    unit = "hundredths of a nat a token" if in_nats([evaluation.score]) else "%"
    return f"{evaluation.subject} {percent(evaluation.score)} {unit}"


class _Phase(Tick):
    """A phase, and how far it is."""

    def __init__(self, title: str, name: str, arm: str | None, iteration: int | None):
        super().__init__()
        self.title, self.name, self.arm, self.iteration = title, name, arm, iteration
        self.began = time.monotonic()
        self.done, self.total, self.note = 0, 0, ""

    def __call__(self, done: int, total: int, note: str) -> None:
        self.done, self.total, self.note = done, total, note

    def row(self) -> RenderableType:
        """The phase on one line: its title, a bar, figures and a note."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        known: dict[str, Any] = (
            {"total": self.total, "completed": self.done} if self.total else {"pulse": True}
        )
        figures = f"{self.done}/{self.total}" if self.total else ""
        elapsed = duration(time.monotonic() - self.began)
        grid.add_row(
            Text(self.title, style="cyan"),
            ProgressBar(width=24, **known),
            Text(figures, no_wrap=True),
            Text(elapsed, no_wrap=True),
            Text(visible(self.note), style="dim", no_wrap=True, overflow="ellipsis"),
        )
        return grid


class _Log(logging.Handler):
    """Puts what the package logs, such as a download, among the lines."""

    def __init__(self, progress: Progress):
        super().__init__(logging.INFO)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self.progress._line(record.getMessage())
