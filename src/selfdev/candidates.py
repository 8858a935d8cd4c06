"""How a text becomes a candidate, and what an arm remembers of its candidates."""

from dataclasses import replace
from typing import TYPE_CHECKING

from selfdev.algorithms.screening import Behaviour, History, Novelty, Screening
from selfdev.algorithms.source import Form, Unreadable, read_program
from selfdev.archive import Archive, Candidate
from selfdev.evaluation.standing import repairs_of

if TYPE_CHECKING:  # whoever only shows a run need not wait for it
    from selfdev.factory.sampling import Sample


def candidate_name(arm: str, t: int, number: int) -> str:
    """Arm, iteration and number, both counted from 1 in a name, such as `learning/2/017`."""
    return f"{arm}/{t + 1}/{number + 1:03d}"


def read_candidate(arm: str, t: int, number: int, prompt: int, sample: "Sample", form: Form) -> Candidate:
    """What the factory wrote, as a candidate; one in which there is no function has failed already."""
    candidate = Candidate(
        candidate_name(arm, t, number),
        arm,
        t,
        number,
        prompt,
        sample.text,
        sample.tokens,
        sample.log_prob,
        sample.finished,
        log_probs=sample.log_probs,
        seconds=sample.seconds,
    )
    try:
        return replace(candidate, source=read_program(sample.text, form))
    except Unreadable as error:
        return replace(candidate, status="failed", failure="NoFunction", error=str(error))


def screened(candidate: Candidate, found: Screening) -> Candidate:
    """The program with what screening said of it."""
    return replace(
        candidate,
        status="failed" if found.novelty is None else str(found.novelty),
        failure=found.failure or None,
        error=found.error or None,
        canonical=found.canonical or None,
        behaviour=None if found.behaviour is None else found.behaviour.to_bytes(),
        nearest=found.nearest or None,
        distance=found.distance,
    )


def unscreened(candidate: Candidate) -> Candidate:
    """The program as it was when it was written."""
    if candidate.source is None:
        return candidate
    return replace(
        candidate,
        status=None,
        failure=None,
        error=None,
        canonical=None,
        behaviour=None,
        nearest=None,
        distance=None,
        screening=None,
    )


def history_of(archive: Archive, arm: str) -> History:
    """What an arm's programs may not repeat: what it wrote so far, and what it was taught of repairs."""
    history = History()
    for earlier in archive.candidates(arm) + archive.candidates(repairs_of(arm)):
        remember(history, earlier)
    return history


def remember(history: History, candidate: Candidate) -> None:
    """Add a program to its arm's history, as the archive knows it; one that failed may be tried again."""
    if candidate.works and candidate.behaviour is not None:
        found = Screening(
            Novelty(str(candidate.status)),
            canonical=candidate.canonical or "",
            behaviour=Behaviour.from_bytes(candidate.behaviour),
            nearest=candidate.nearest or "",
        )
        history.add(candidate.name, found)
