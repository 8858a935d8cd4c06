"""What an unknown name might have meant."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the nearest one that is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"the nearest known one is '{close[0]}'" if close else "there are none"


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
