"""What was measured, from the data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .markdown import table


def results(folder: Path, name: str) -> str:
    """A data file as Markdown: what was measured, with what, and its tables."""
    found = _read(folder / f"{name}.json")
    parts = [found["about"], _made(found), *found["notes"]]
    for each in found["tables"]:
        if each["title"]:
            parts.append(f"## {each['title']}")
        parts.append(table(each["columns"], each["rows"]))
    return "\n\n".join(part for part in parts if part)


def overview(folder: Path) -> str:
    """Every data file, the command that makes it anew, and when that was done last."""
    found = {file.stem: _read(file) for file in sorted(folder.glob("*.json"))}
    rows = [
        (f"[{each['title']}]({name}.md)", f"`{each['command']}`" if each["command"] else "by hand", each["date"])
        for name, each in found.items()
    ]
    return table(("table", "made by", "date"), rows)


def _read(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def _made(found: dict[str, Any]) -> str:
    if not found["command"]:
        return ""
    made_with = ", ".join(f"{name} {value}" for name, value in found["made_with"].items())
    return f"*`{found['command']}` makes it anew. Date: {found['date']}. With: {made_with or 'not recorded'}.*"
