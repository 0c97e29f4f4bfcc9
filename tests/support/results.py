"""The handbook's data files: what `make` measured, read and written in one place.

A file of `examples/handbook/data` says what was measured, by which command, when and with what, and holds its tables.
The pages of the handbook render them; nothing is copied by hand.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples" / "handbook" / "data"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text under the names of their columns, which may hold Markdown."""

    columns: Row
    rows: tuple[Row, ...]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns) or not all(isinstance(cell, str) for cell in row):
                raise ValueError(f"a row of {len(self.columns)} texts is wanted, got {row!r}")

    @staticmethod
    def of(columns: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> Table:
        """The same from any iterables."""
        return Table(tuple(columns), tuple(tuple(row) for row in rows), title)

    def __str__(self) -> str:
        lines = (self.columns, ("---",) * len(self.columns), *self.rows)
        return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


@dataclass(frozen=True)
class Results:
    """One data file.

    Attributes:
        command: what makes it anew.
        date: when its numbers were measured.
        made_with: versions and the machine, as far as they are known.
    """

    title: str
    command: str
    date: str
    made_with: dict[str, str]
    about: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()


def read(name: str) -> Results:
    """The data file of that name."""
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    tables = tuple(Table.of(t["columns"], t["rows"], t["title"]) for t in found["tables"])
    return Results(**{**found, "tables": tables, "notes": tuple(found["notes"])})


def write(name: str, tables: Iterable[Table], notes: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
    """Puts new numbers into a data file; what it is about stays."""
    made_with = {"python": platform.python_version(), "numpy": version("numpy")}
    made_with |= {p: version(p) for p in packages} | {"CPU cores": str(os.cpu_count())}
    today = datetime.now(UTC).date().isoformat()
    new = replace(read(name), date=today, made_with=made_with, tables=tuple(tables), notes=tuple(notes))
    file = FOLDER / f"{name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(as_text(new), encoding="utf-8")
    partial.replace(file)
    print(f"written to {file}")


def as_text(results: Results) -> str:
    """JSON with a line for each row, so that a change of one number is a change of one line."""
    head = {k: getattr(results, k) for k in ("title", "command", "date", "made_with", "about")}
    tables = ",\n".join(_table_text(t) for t in results.tables)
    notes = json.dumps(results.notes, indent=1, ensure_ascii=False).replace("\n", "\n ")
    start = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    return f'{start},\n "tables": [\n{tables}\n ],\n "notes": {notes}\n}}\n'


def _table_text(table: Table) -> str:
    title, columns = _json(table.title), _json(table.columns)
    rows = ",\n".join(f"    {_json(row)}" for row in table.rows)
    return f'  {{\n   "title": {title},\n   "columns": {columns},\n   "rows": [\n{rows}\n   ]\n  }}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
