"""The working programs next to a failing one: what one or two small edits make of it.

A small factory fails mostly by slips: a sum over everything where one over the experts was meant, a name that is not
there, a method that tensors do not have. What the program was after is still in it. A failing program and a neighbour
that works are the sharpest preference pair there is, since they differ in the slip alone.

Edits change the text where the slip is and leave the rest as it was written. Nothing here runs a program.
"""

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from selfdev.algorithms.screening import History, Novelty, Screening
from selfdev.algorithms.source import unwrap_short, wrap_short

REDUCTIONS = frozenset(
    {"sum", "mean", "std", "var", "prod", "norm", "median", "max", "min", "amax", "amin", "argmax", "argmin"}
    | {"softmax", "cumsum", "cumprod", "sort"}
)
"""Calls that mean all entries, or want a dimension, where a program that merges nearly always means the experts."""


@dataclass(frozen=True)
class _Edit:
    """Put `text` in the place of `begin:end`."""

    begin: int
    end: int
    text: str


def repair(
    source: str, screen: Callable[[str, History], Screening], history: History, tries: int
) -> tuple[str, Screening] | None:
    """Find a neighbour that works and is new.

    Args:
        source: a failing program in the contract's form.
        screen: runs a program, in the jail.
        history: what it may not repeat.
        tries: neighbours that are run at most.

    Returns:
        The neighbour in the contract's form and what screening said of it; None if none of them will do.
    """
    short = unwrap_short(source)
    for neighbour in neighbours(short, tries):
        whole = neighbour if short == source else wrap_short(neighbour)
        found = screen(whole, history)
        if found.novelty is Novelty.NEW:
            return whole, found
    return None


def neighbours(source: str, limit: int) -> Iterator[str]:
    """Programs that are one edit away, then those that are two edits away.

    Args:
        source: a program, of any form, that need not run.
        limit: at most so many.

    Yields:
        Different programs that parse, the likeliest repairs first; none if `source` does not parse.
    """
    seen = {source}
    edges = [source]
    for _ in range(2):
        reached: list[str] = []
        for text in edges:
            for edit in _edits(text):
                edited = text[: edit.begin] + edit.text + text[edit.end :]
                if edited in seen or not _parses(edited):
                    continue
                seen.add(edited)
                reached.append(edited)
                if len(seen) > limit + 1:
                    return
                yield edited
        edges = reached


def _edits(source: str) -> Iterator[_Edit]:
    if not source.isascii() or not _parses(source):
        return
    tree = ast.parse(source)
    place = _Places(source)
    own = _bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from _other_names(node, own, place)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from _reduced(node.value, place)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _over_experts(node, place)
            yield from _without(node, place)


def _other_names(node: ast.Name, own: list[str], place: "_Places") -> Iterator[_Edit]:
    """Another name for one that nobody has given."""
    if node.id not in own and node.id != "torch" and not hasattr(builtins, node.id):
        begin, end = place(node)
        for name in own:
            yield _Edit(begin, end, name)


def _reduced(value: ast.expr, place: "_Places") -> Iterator[_Edit]:
    """The sum or the mean over the experts of what is returned."""
    begin, end = place(value)
    inner = place.source[begin:end]
    simple = isinstance(value, ast.Name | ast.Call | ast.Attribute | ast.Subscript)
    inner = inner if simple else f"({inner})"
    yield _Edit(begin, end, f"{inner}.sum(dim=0)")
    yield _Edit(begin, end, f"{inner}.mean(dim=0)")


def _over_experts(call: ast.Call, place: "_Places") -> Iterator[_Edit]:
    """`dim=0` for a reduction that has no dimension."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in REDUCTIONS:
        return
    of_module = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    if len(call.args) == of_module and not any(k.arg == "dim" for k in call.keywords):
        _, end = place(call)
        yield _Edit(end - 1, end, ", dim=0)" if call.args or call.keywords else "dim=0)")


def _without(call: ast.Call, place: "_Places") -> Iterator[_Edit]:
    """What a method was called on, without the call."""
    if isinstance(call.func, ast.Attribute) and not (
        isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    ):
        _, end = place(call)
        yield _Edit(place(call.func.value)[1], end, "")


def _bound(tree: ast.AST) -> list[str]:
    """The names that the program gives, those of arguments first."""
    arguments = [n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)]
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys(arguments + stored))


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


class _Places:
    """Where a node stands in an ASCII source."""

    def __init__(self, source: str):
        self.source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def __call__(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self._lines[node.lineno - 1] + node.col_offset
        return begin, self._lines[node.end_lineno - 1] + node.end_col_offset
