"""Parts of values: one after the other, and one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..laws import (
    Law,
    place_law,
)
from ..packing import Packing
from ..reach import Reach
from ..sizes import Size
from .base import Argument, Op, Shape, Vanish, one_signal


@dataclass(frozen=True)
class Concat(Op):
    """The arguments, one after the other; steering one part alone reaches that part only."""

    kind: ClassVar[str] = "concat"
    injective: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        if not args or any(a.parameter for a in args):
            raise BadInput("concat takes one or more signals, no parameters")
        total = Size.of(0)
        for a in args:
            total = total + a.width
        return (total,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return xp.concatenate(args, axis=-1)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return place_law(self.kind)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        if all(r is moved[0] for r in moved):
            return Reach.BALL if moved[0].bounded and moved[0] is not Reach.POINT else moved[0]
        return Reach.BALL if all(r.bounded for r in moved) else Reach.PROPER

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.HOLES if any(args) and min(args) is not Vanish.ALL else min(args)


@dataclass(frozen=True)
class Slice(Op):
    """y = u[start:stop]."""

    start: Size
    stop: Size
    kind: ClassVar[str] = "slice"

    def infer(self, args: Sequence[Argument]) -> Shape:
        (width,) = one_signal(self.kind, args)
        inside = self.start.at_most(self.stop) is not False and self.stop.at_most(width) is not False
        if not inside or self.start == self.stop:
            raise BadInput(f"slice: {self.start}:{self.stop} is not a part of width {width}")
        return (self.stop - self.start,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return args[0][:, self.start.known : self.stop.known]

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return place_law(self.kind)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return {Reach.PROPER: Reach.ALL, Reach.SPHERE: Reach.BALL, Reach.SIMPLEX: Reach.BALL}.get(moved[0], moved[0])

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] else Vanish.NEVER
