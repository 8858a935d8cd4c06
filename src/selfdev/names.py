"""What an unknown name might have meant."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel

_SIMILAR = 0.5
"""Least similarity, from 0 to 1, of a name that somebody may have meant."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the nearest one that is, or all where none is near."""
    names = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=_SIMILAR)
    if close:
        return f"the nearest known one is '{names[close[0]]}'"
    return f"known are {', '.join(names.values())}" if names else "there are none"


def fields_at(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The fields that stand where a path leads.

    Args:
        section: where it begins.
        path: names of fields, and of the keys of mappings whose values are sections.
    """
    for part in path:
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a type names: itself, one that may be None, or the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
