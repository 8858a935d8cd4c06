"""What a transfer came to: the verdict's table for models that the run has not seen."""

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from selfdev.report.result import headline, scores_table, tasks_tables
from selfdev.report.terminal import facts, visible

if TYPE_CHECKING:
    from selfdev.results import Transfer


def transfer_result(transfer: "Transfer") -> RenderableType:
    """The whole page of a transfer, finished or not."""
    summary = transfer.summary()
    parts: list[RenderableType] = [headline(summary, transfer), ""]
    if summary["table"]:
        parts += [scores_table(summary, transfer), "", *tasks_tables(summary, transfer)]
    return Group(*parts, _what(summary, transfer))


def _what(summary: dict[str, Any], transfer: "Transfer") -> RenderableType:
    known = summary["transfer"]
    folder = summary["run"]["folder"]
    experts = ", ".join(f"{name}={source}" for name, source in known["experts"].items())
    sizes = transfer.config.task
    asked = (
        f"{known['task']}, {sizes.development} of development and {sizes.test} of test; neither split holds a question "
        "that the run asked"
    )
    tuned = (
        f"on these experts, {known['evaluations']} development evaluations each, as in the run; "
        "the programs are as the run left them"
    )
    if known["left_out"]:
        tuned += f". Left out, for the number of experts: {', '.join(known['left_out'])}"
    rows: dict[str, RenderableType] = {
        "seed": Text(visible(known["seed"])),
        "experts": Text(visible(experts)),
        "questions": Text(visible(asked)),
        "rivals": Text(visible(f"tuned {tuned}")),
        "all_figures": Text(visible(f"selfdev show {folder} --json")),
    }
    return facts(**rows)
