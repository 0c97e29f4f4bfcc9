"""How the next token is chosen from logits, in numbers and their limits; drawing is a backend's matter."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable one.
        top_k, top_p: only the k most probable, or the fewest that hold this much probability.
        seed: of the draws.

    Raises:
        BadInput: a number out of its limits.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise BadInput(f"temperature must be 0 (the most probable token) or more, got {self.temperature!r:.60}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise BadInput(f"top_k must be a whole number of at least 1, got {self.top_k!r:.60}")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise BadInput(f"top_p must be above 0 and at most 1, got {self.top_p!r:.60}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise BadInput(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r:.60}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)
