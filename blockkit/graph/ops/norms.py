"""Normalisation without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..arrays import Array, Arrays, wide_dtype
from ..laws import (
    Law,
    direction_law,
    limited_law,
)
from ..packing import Packing
from ..reach import Reach
from .base import Argument, Op, Shape, Vanish, one_signal


@dataclass(frozen=True)
class RMSNorm(Op):
    """y = h / sqrt(mean(h^2) + eps), without parameters."""

    eps: float = 1e-6
    kind: ClassVar[str] = "rms_norm"

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return self.eps > 0

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        h = xp.cast(args[0], wide_dtype(dtype := xp.dtype_of(args[0])))
        return xp.cast(h * xp.rsqrt(xp.mean(h * h) + self.eps), dtype)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return direction_law(self.kind, "it has no parameters and its results keep mean(y^2) below 1")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SPHERE


@dataclass(frozen=True)
class LayerNorm(Op):
    """y = (h - mean h) / sqrt(var h + eps), without parameters."""

    eps: float = 1e-5
    kind: ClassVar[str] = "layer_norm"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        h = xp.cast(args[0], wide_dtype(dtype := xp.dtype_of(args[0])))
        h = h - xp.mean(h)
        return xp.cast(h * xp.rsqrt(xp.mean(h * h) + self.eps), dtype)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        limit = "it has no parameters and its results keep mean(y) = 0 and mean(y^2) below 1"
        return limited_law(self.kind, Reach.SPHERE, limit)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SPHERE

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] is Vanish.ALL else Vanish.NEVER
