"""Sums, products and linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..laws import (
    Law,
    divide_law,
    scale_law,
    shift_law,
    through_law,
    weight_law,
)
from ..packing import Packing
from ..reach import Reach, mapped, product_of, scaled, sum_of
from .base import Argument, Op, Shape, Vanish, one_signal, same_width, show_shape


@dataclass(frozen=True)
class Add(Op):
    """y = a + b + ..., of signals or vectors of parameters."""

    kind: ClassVar[str] = "add"
    injective: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        return same_width(self.kind, args, 2)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        total = args[0] + args[1]
        for a in args[2:]:
            total = total + a
        return total

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return shift_law(self.kind, args[position].parameter)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        total = moved[0]
        for r in moved[1:]:
            total = sum_of(total, r)
        return total

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return min(args)


@dataclass(frozen=True)
class Multiply(Op):
    """y = a * b; with an offset c, y = a * (c + b) (Gemma's norms have c = 1)."""

    kind: ClassVar[str] = "multiply"
    injective: ClassVar[bool] = True  # by a vector without zeros
    offset: float = 0.0

    def infer(self, args: Sequence[Argument]) -> Shape:
        if len(args) != 2:
            raise BadInput(f"multiply takes exactly 2 arguments, got {len(args)}")
        return same_width(self.kind, args, 2)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return args[0] * (args[1] + self.offset if self.offset else args[1])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return divide_law(self.kind, 1 - position, self.offset)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        second = sum_of(moved[1], Reach.POINT)
        return product_of(moved[0], second)

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        first, second = args[0], Vanish.NEVER if self.offset else args[1]
        return Vanish.ALL if first and second else max(first, second)  # holes may complement each other


@dataclass(frozen=True)
class Scale(Op):
    """y = alpha a for a known number alpha."""

    alpha: float
    kind: ClassVar[str] = "scale"

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return self.alpha != 0

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return args[0] * self.alpha

    def law(self, position: int, args: Sequence[Argument]) -> Law | None:
        return scale_law(self.alpha)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return scaled(moved[0], self.alpha)


@dataclass(frozen=True)
class MatMul(Op):
    """y = W z, with W `[d_out, d_in]`."""

    kind: ClassVar[str] = "matmul"

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[d_out]`; see `Op.infer`."""
        if len(args) != 2 or args[0].parameter or len(args[1].shape) != 2 or len(args[0].shape) != 1:
            raise BadInput('matmul takes a signal and a matrix, as {"args": ["z", "W"]} for y = W z')
        rows, columns = args[1].shape
        if columns != args[0].width:
            shown = show_shape(args[1].shape)
            raise BadInput(
                f"matmul: the matrix {shown} (d_out, d_in) takes width {columns}, "
                f"but its signal has width {args[0].width}"
            )
        return (rows,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return xp.linear(args[0], args[1])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return weight_law() if position == 1 else through_law()

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        rows, columns = args[1].shape
        return mapped(moved[0], rows.at_most(columns)) if moved[1] is Reach.POINT else Reach.ALL

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] is Vanish.ALL else Vanish.NEVER
