"""What an operation is: its shape rule, forward meaning, laws and reach, declared in one place.

A value is a vector per token; an executor holds `[tokens, width]` for it. Parameters are matrices
`[d_out, d_in]` or vectors `[width]`. An operation is a frozen dataclass of its attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..laws import (
    Law,
)
from ..packing import Packing
from ..reach import Reach
from ..sizes import Size

Shape = tuple[Size, ...]


class Vanish(IntEnum):
    """Which zeros a value has, not by chance but for whole regions of contexts."""

    NEVER = 0
    HOLES = 1  # some coordinates, never all
    ALL = 2  # possibly all


@dataclass(frozen=True)
class Argument:
    """What an operation knows of an argument when it is built: its shape, and whether it is a parameter."""

    shape: Shape
    parameter: bool

    @property
    def width(self) -> Size:
        return self.shape[0]


class Op:
    """Base of the operations. `kind` is the operation's name in raw graphs."""

    kind: ClassVar[str] = ""
    mixing: ClassVar[bool] = False  # looks at other tokens: the only way in for the context
    injective: ClassVar[bool] = False  # different arguments give different results

    def infer(self, args: Sequence[Argument]) -> Shape:
        """The result's shape.

        Raises:
            BadInput: the arguments do not fit; the message says what is allowed.
        """
        raise NotImplementedError

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        """The value, `[tokens, width]`, of arguments `[tokens, width]` or parameters."""
        raise NotImplementedError

    def law(self, position: int, args: Sequence[Argument]) -> Law | None:
        """How to solve for the argument at `position`; None where the operation says nothing."""
        return None

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        """An upper bound on the results when the arguments move within `moved`, each on its own."""
        return Reach.POINT if all(r is Reach.POINT for r in moved) else Reach.ALL

    def fills(self, filled: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        """What contexts make of the result when they make `filled` of the arguments; POINT where that is unknown."""
        return self.reach(filled, args)

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        """Which zeros whole regions of contexts give, when the arguments have those of `args`."""
        return max(args, default=Vanish.NEVER)


def same_width(kind: str, args: Sequence[Argument], least: int) -> Shape:
    if len(args) < least:
        raise BadInput(f"{kind} takes at least {least} arguments, got {len(args)}")
    if all(a.parameter for a in args):
        raise BadInput(f"{kind} takes at least one signal, got parameters only")
    for a in args:
        if len(a.shape) != 1:
            raise BadInput(f"{kind} takes vectors, got a matrix {show_shape(a.shape)}; use matmul")
        if a.width != args[0].width:
            shapes = ", ".join(show_shape(a.shape) for a in args)
            raise BadInput(f"{kind} takes arguments of one width, got {shapes}")
    return args[0].shape


def one_signal(kind: str, args: Sequence[Argument]) -> Shape:
    if len(args) != 1 or args[0].parameter:
        raise BadInput(f"{kind} takes exactly one signal, got {len(args)} argument(s)")
    return args[0].shape


def show_shape(shape: Shape) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
