"""Operations of which nothing more is known than whether they look at other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..packing import Packing
from ..reach import Reach
from ..sizes import Size
from .base import Argument, Op, Shape, Vanish


@dataclass(frozen=True)
class Mix(Op):
    """An operation that looks at other tokens and of which nothing more is known.

    It is judged and planned around, never solved; numbers come from whoever runs the graph
    (`blockkit.trials.trial` gives it random values).
    """

    width: Size | None = field(default=None)
    kind: ClassVar[str] = "mix"
    mixing: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        if self.width is not None:
            return (self.width,)
        if not args:
            raise BadInput("mix needs an argument, or a width")
        return (args[0].width,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        raise BadInput("a mix node has no numbers of its own; it can be judged, planned and tried")

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.NEVER


@dataclass(frozen=True)
class Opaque(Op):
    """A token-wise operation of which nothing is known: without laws, and with any zeros; planned around.

    Front ends use it for what they cannot name. It has no numbers of its own.
    """

    width: Size
    kind: ClassVar[str] = "opaque"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return (self.width,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        raise BadInput("an opaque node has no numbers of its own; it can be judged and planned around")

    def fills(self, filled: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL
