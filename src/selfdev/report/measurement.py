"""What `selfdev evaluate` prints."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from selfdev.evaluation.harness import Agreement
from selfdev.evaluation.measure import Measurement


def measurement_json(measured: Measurement, agreement: Agreement | None) -> dict[str, Any]:
    """As `--json` prints it."""
    return measured.to_dict() | {"lm_eval": None if agreement is None else asdict(agreement)}


def measurement_text(measured: Measurement, agreement: Agreement | None) -> str:
    """For people."""
    return "\n".join(_lines(measured, agreement))


def _lines(measured: Measurement, agreement: Agreement | None) -> Iterator[str]:
    count = len(measured.answers)
    asked = f"{count} {measured.split} questions"
    yield f"{measured.model} on {measured.task}, {asked}, {measured.seconds:.1f} s, {measured.place}"
    if measured.low is None or measured.high is None:
        yield f"score       {measured.score:.3f} nats a token (above is better)"
        yield from (f"  {group}{mean:.3f}" for group, mean in _several(measured.groups))
    else:
        interval = f"95 % interval {_percent(measured.low)} to {_percent(measured.high)}"
        yield f"score       {_percent(measured.score)}, {interval}"
        yield from (f"  {group}{_percent(mean)}" for group, mean in _several(measured.groups))
        yield from (f"  by {name}{_percent(share)}" for name, share in _padded(measured.extractions))
    if agreement is not None:
        same = f"the same verdict on {agreement.verdicts} of {agreement.questions}"
        if agreement.extracted is not None:
            same += f", the same answer on {agreement.extracted}"
        yield f"lm-eval     {_percent(agreement.score)}; {same}"
    if measured.note:
        yield f"note        {measured.note}"


def _several(groups: dict[str, float]) -> list[tuple[str, float]]:
    return _padded(groups) if len(groups) > 1 else []


def _padded(figures: dict[str, float]) -> list[tuple[str, float]]:
    """Names filled up to the longest, and their figures."""
    width = max(map(len, figures), default=0) + 2
    return [(f"{name:{width}}", figure) for name, figure in figures.items()]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
