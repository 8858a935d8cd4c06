"""Rows: the records of a data file, each with the line it stands on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdev.errors import UserError


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        file: that it came from.
        number: its line, counted from 1.
        fields: column -> value.
    """

    file: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}:{self.number}"


def read_rows(file: Path) -> list[Row]:
    """Read a file of JSON lines; empty lines are left out. A `.parquet` file is read too (extra `eval`).

    Raises:
        UserError: the file is absent or empty, a line is no JSON object, or a column `id` repeats itself.
    """
    rows = _parquet(file) if file.suffix == ".parquet" else _json_lines(file)
    if not rows:
        raise UserError(f"{file}: it holds no question; each line is one, a JSON object")
    lines: dict[str, int] = {}
    for row in rows:
        if "id" in row.fields:
            identity = json.dumps(row.fields["id"])
            if identity in lines:
                raise UserError(
                    f"{row.where}: the id {identity} stands on line {lines[identity]} already; "
                    "give each question an id of its own, or leave the column out"
                )
            lines[identity] = row.number
    return rows


def _json_lines(file: Path) -> list[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: it is no text in UTF-8; save it as UTF-8") from None
    rows = []
    # Not splitlines(), which also breaks at characters that a JSON string may hold.
    for number, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            fields = json.loads(record)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}:{number}: no JSON: {error.msg} at column {error.colno}; each line is one JSON object"
            ) from None
        except ValueError as error:  # a number of more digits than Python reads
            raise UserError(f"{file}:{number}: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(
                f"{file}:{number}: {type(fields).__name__}, not an object; a line reads "
                '{"question": "...", "answer": "..."}'
            )
        rows.append(Row(file, number, fields))
    return rows


def _parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs pyarrow: pip install 'selfdev[eval]', or give a folder of JSON lines"
        ) from error
    return [Row(file, i, fields) for i, fields in enumerate(parquet.read_table(file).to_pylist(), start=1)]
