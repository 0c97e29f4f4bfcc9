"""The components as people look them up: what each computes, its settings and their defaults."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from .components import COMPONENTS, Component


def components_json() -> list[dict[str, Any]]:
    """One entry a component: its name in specs, what it computes, what it reads, and its settings."""
    return [
        {"component": kind, "computes": _computes(cls), "reads": _reads(cls), "settings": _settings(cls)}
        for kind, cls in COMPONENTS.items()
    ]


def components_text(entries: list[dict[str, Any]]) -> str:
    """The same as a page of text."""
    lines = []
    for entry in entries:
        lines.append(f"{entry['component']}: {entry['computes']}")
        shown = [k if v == "required" else f"{k} = {v}" for k, v in entry["settings"].items()]
        lines.append(f"    {entry['reads']}" + "".join(f", {s}" for s in shown))
    return "\n".join(lines)


def _computes(cls: type[Component]) -> str:
    """The first sentence of the class's docstring, on one line."""
    first = (cls.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(first.split())


def _reads(cls: type[Component]) -> str:
    return "inputs" if any(f.name == "inputs" for f in fields(cls)) else "input"  # type: ignore[arg-type]


def _settings(cls: type[Component]) -> dict[str, str]:
    found = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in ("input", "inputs", "name"):
            found[f.name] = "required" if f.default is MISSING else _shown(f.default)
    return found


def _shown(default: Any) -> str:
    """A default as it stands in YAML."""
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
