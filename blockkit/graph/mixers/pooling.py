"""Average pooling along the sequence (PoolFormer, arXiv 2111.11418): mixing without a single parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..ops import Argument, Shape
from ..ops.mixing import MixingOp

EVERYWHERE = 1 << 30  # further than any two positions are apart


@dataclass(frozen=True)
class AveragePool(MixingOp):
    """The mean of the rows that a token sees, less its own row. Argument: `u [tokens, width]`.

    Attributes:
        window: only tokens less than so many positions away; None for all.
        causal: only the token itself and those before it.
    """

    window: int | None = None
    causal: bool = True
    kind: ClassVar[str] = "average_pool"

    @property
    def signals(self) -> int:
        return 1

    @property
    def sees_later(self) -> bool:
        return not self.causal

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[width]`; see `Op.infer`."""
        if len(args) != 1 or args[0].parameter:
            raise BadInput(f"{self.kind} takes one signal and no parameters")
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        rows, n = args[0], int(args[0].shape[0])
        dtype, reach = xp.dtype_of(rows), EVERYWHERE if self.window is None else self.window
        distance = positions[:, None] - positions[None, :]
        seen = (distance < reach) & (distance >= (0 if self.causal else 1 - reach))
        weights = xp.cast(seen, dtype)
        return xp.matmul(weights, rows) / (xp.mean(weights) * n) - rows
