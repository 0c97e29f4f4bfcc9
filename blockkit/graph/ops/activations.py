"""Functions of one value: activations, soft caps, and the softmax over the coordinates of one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..laws import (
    Law,
    invert_law,
    limited_law,
)
from ..packing import Packing
from ..reach import Reach
from .base import Argument, Op, Shape, Vanish, one_signal


@dataclass(frozen=True)
class Function:
    """What the planner needs to know of an activation, beside its values."""

    reach: Reach
    limit: str
    bijective: bool = False
    injective: bool = False
    flat: bool = False  # exactly zero on a whole half-line


FUNCTIONS: dict[str, Function] = {
    "identity": Function(Reach.ALL, "", bijective=True, injective=True),
    "leaky_relu": Function(Reach.ALL, "", bijective=True, injective=True),
    "relu": Function(Reach.NON_NEGATIVE, "its results are never negative", flat=True),
    "relu2": Function(Reach.NON_NEGATIVE, "its results are never negative", flat=True),
    "gelu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "gelu_tanh": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "quick_gelu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "silu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.28)"),
    "tanh": Function(Reach.BALL, "its results stay between -1 and 1", injective=True),
    "sigmoid": Function(Reach.BALL, "its results stay between 0 and 1", injective=True),
}
LEAK = 0.01


def apply_function(xp: Arrays, fn: str, u: Array) -> Array:
    """The activation `fn` of `u`, coordinate by coordinate."""
    match fn:
        case "identity":
            return u
        case "relu":
            return xp.maximum(u, 0.0)
        case "relu2":
            return xp.maximum(u, 0.0) * xp.maximum(u, 0.0)
        case "leaky_relu":
            return xp.maximum(u, 0.0) - LEAK * xp.maximum(-u, 0.0)
        case "silu":
            return u * xp.sigmoid(u)
        case "quick_gelu":
            return u * xp.sigmoid(1.702 * u)
        case "tanh":
            return xp.tanh(u)
        case "sigmoid":
            return xp.sigmoid(u)
        case "gelu":
            return 0.5 * u * (1 + xp.erf(u * 0.7071067811865476))
        case _:  # gelu_tanh
            return 0.5 * u * (1 + xp.tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))


@dataclass(frozen=True)
class Activation(Op):
    """y = fn(u), coordinate by coordinate."""

    fn: str
    kind: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        if self.fn not in FUNCTIONS:
            raise BadInput(f"activation: unknown fn {self.fn!r}; allowed are {', '.join(FUNCTIONS)}")

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return FUNCTIONS[self.fn].injective

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return apply_function(xp, self.fn, args[0])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        known = FUNCTIONS[self.fn]
        if known.bijective:
            return invert_law(self.kind, self.fn)
        return limited_law(self.kind, known.reach, f"{self.fn}: {known.limit}")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        known = FUNCTIONS[self.fn]
        if moved[0] is Reach.POINT or known.bijective:
            return Reach.BALL if moved[0] in (Reach.SPHERE, Reach.SIMPLEX) else moved[0]
        return Reach.BALL if moved[0].bounded else known.reach

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        if FUNCTIONS[self.fn].flat:
            return Vanish.ALL
        return Vanish.NEVER if self.fn == "sigmoid" else args[0]


@dataclass(frozen=True)
class Softcap(Op):
    """y = cap tanh(u / cap)."""

    cap: float
    kind: ClassVar[str] = "softcap"
    injective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise BadInput(f"softcap: cap must be positive, got {self.cap}")

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return self.cap * xp.tanh(args[0] / self.cap)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.BALL, f"its results stay between -{self.cap:g} and {self.cap:g}")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.BALL


@dataclass(frozen=True)
class Softmax(Op):
    """y = softmax(u) over the coordinates of one token."""

    kind: ClassVar[str] = "softmax"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        return xp.softmax(args[0])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.SIMPLEX, "its results are non-negative and sum to 1")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SIMPLEX

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.NEVER
