"""The operations that look at other tokens: the only way in for the context.

A mixing operation is one node of a graph, with its own forward. It is judged and planned around, never
solved. Its first arguments are signals, the rest are parameters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ..arrays import Array, Arrays
from ..packing import Packing, Past
from .base import Op, Vanish


class MixingOp(Op):
    """Base of the operations along the sequence.

    A subclass says what one sequence gives (`sequence`); packed runs and runs that remember earlier tokens
    follow from that.
    """

    mixing: ClassVar[bool] = True

    @property
    def signals(self) -> int:
        """How many of the arguments, the first ones, are signals `[tokens, width]`."""
        raise NotImplementedError

    @property
    def sees_later(self) -> bool:
        """Whether a token also sees tokens that come after it; then rows go by their positions, in any order."""
        return False

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """The result `[n, width]` for one sequence of n tokens in order, at `positions [n]`."""
        raise NotImplementedError

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        """Every segment of the packed run by itself; see `Op.forward`."""
        return self.mix(xp, args, packing, None)

    def mix(self, xp: Arrays, args: Sequence[Any], packing: Packing, past: Past | None) -> Array:
        """As `forward`; the first segment also sees the rows of `past`, which came before it."""
        rows, stored, out, start = args[: self.signals], args[self.signals :], [], 0
        for number, count in enumerate(packing.segments):
            mine = [value[start : start + count] for value in rows]
            at, before = packing.positions[start : start + count], 0
            if past is not None and not number:
                before = int(past.positions.shape[0])
                mine = [xp.concatenate([a, b], axis=0) for a, b in zip(past.args, mine, strict=True)]
                at = xp.concatenate([past.positions, at], axis=0)
            out.append(self.sequence(xp, [*mine, *stored], at)[before:])
            start += count
        return out[0] if len(out) == 1 else xp.concatenate(out, axis=0)

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.NEVER
