"""What specs may hold, from the declarations themselves."""

from __future__ import annotations

from blockkit.checkpoint.configuration import supported
from blockkit.design.reference import components_json

from .markdown import table


def components() -> str:
    """One row a component: what it computes, what it reads, and its settings with their defaults."""
    rows = []
    for entry in components_json():
        settings = [f"`{k}`" if v == "required" else f"`{k}` = {v}" for k, v in entry["settings"].items()]
        rows.append((f"`{entry['component']}`", entry["computes"], f"`{entry['reads']}`", ", ".join(settings) or "-"))
    return table(("component", "computes", "reads", "settings"), rows)


def model_types() -> str:
    """The model types of Hugging Face whose configurations and checkpoints are read."""
    return ", ".join(f"`{name}`" for name in sorted(supported()))
