"""How long work tells how far it is: a stage in words, and the fraction of it that is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(stage: str, fraction: float) -> None:
    """The progress of those who do not ask for any."""
