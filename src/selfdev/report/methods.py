"""The library of human-designed methods, listed."""

from typing import Any

from rich.console import RenderableType
from rich.text import Text

from selfdev.algorithms.library import methods
from selfdev.report.terminal import table


def describe_methods() -> list[dict[str, Any]]:
    """What `selfdev methods --json` prints: every method with its parameters and their search ranges."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": str(method.paper),
            "arxiv": method.paper.arxiv,
            "needs_seed": method.needs_seed,
            "experts": method.experts,
            "parameters": [
                {
                    "name": parameter.name,
                    "default": parameter.default,
                    "low": parameter.low,
                    "high": parameter.high,
                    "log": parameter.log,
                    "integer": parameter.integer,
                    "per_expert": parameter.per_expert,
                    "choices": list(parameter.choices),
                }
                for parameter in method.parameters
            ],
        }
        for method in methods().values()
    ]


def methods_table(listed: list[dict[str, Any]]) -> RenderableType:
    """The same for people."""
    rows = table("method", "what it does, its parameters, its paper", left=2)
    for method in listed:
        names = ", ".join(parameter["name"] for parameter in method["parameters"]) or "no parameter"
        rows.add_row(
            method["name"], Text.assemble(method["summary"], (f"\n{names}; {method['paper']}", "dim"))
        )
    return rows
