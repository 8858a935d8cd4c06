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
    rows = table("method", "what it does, its parameters (search range), its paper", left=2)
    for method in listed:
        parameters = ", ".join(map(_described, method["parameters"])) or "no parameter"
        rows.add_row(
            method["name"], Text.assemble(method["summary"], (f"\n{parameters}; {method['paper']}", "dim"))
        )
    return rows


def _described(parameter: dict[str, Any]) -> str:
    """Its default as the command line takes it, and what it can be: `density=0.2 (0.1..1)`."""
    default, values = parameter["default"], []
    if parameter["choices"]:
        values.append(" or ".join(map(_written, parameter["choices"])))
    if parameter["low"] is not None:
        values.append(f"{_written(parameter['low'])}..{_written(parameter['high'])}")
    if parameter["per_expert"]:
        values.append("one for each expert")
    given = "" if default is None else f"={_written(default)}"
    return f"{parameter['name']}{given} ({', '.join(values)})"


def _written(value: float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
