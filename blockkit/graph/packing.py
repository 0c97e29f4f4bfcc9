"""How tokens lie in one packed run: their positions, and which of them see each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .arrays import Array


@dataclass(frozen=True)
class Past:
    """What a mixing operation remembers of earlier tokens: its arguments' rows, and their positions."""

    args: tuple[Array, ...]
    positions: Array


@dataclass(frozen=True)
class Packing:
    """Rows of a packed run.

    Several sequences lie one after the other, so that each weight is read once for all of them;
    only mixing operations tell them apart.

    Attributes:
        positions: `[tokens]` integers, the position of each row in its own sequence.
        segments: the number of rows of each sequence, in order.
        past: for runs with a cache, by mixing node: what came before, seen by the first segment.
        memory: for cross-attention, what each segment's tokens also look at: `[m, width]`, rows of the encoder's
            result; one for each segment, or none at all.
    """

    positions: Array
    segments: tuple[int, ...]
    past: Mapping[str, Past] = field(default_factory=dict)
    memory: tuple[Array, ...] = ()
