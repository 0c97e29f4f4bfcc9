"""RWKV's two ways to look back: the token shift, and the weighted sum with exponential decay (arXiv 2305.13048)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays import Array, Arrays, wide_dtype
from ..ops import Argument, Shape
from ..ops.mixing import MixingOp
from .checks import check_count, check_shape

NOTHING = -1e38  # the exponent of an empty sum


@dataclass(frozen=True)
class TokenShift(MixingOp):
    """y_t = m * u_t + (1 - m) * u_{t-1}; before the first row stands zero.

    Arguments: `u [tokens, width]` and a parameter `m [width]`.
    """

    kind: ClassVar[str] = "token_shift"

    @property
    def signals(self) -> int:
        return 1

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[width]`; see `Op.infer`."""
        check_count(self.kind, args, ("a signal", "a mix"))
        check_shape(self.kind, "the mix", args[1], args[0].shape)
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        rows, mix = args
        nothing = xp.asarray(np.zeros((1, int(rows.shape[1]))), xp.dtype_of(rows))
        before = xp.concatenate([nothing, rows[: int(rows.shape[0]) - 1]], axis=0)
        return rows * mix + before * (1 - mix)


@dataclass(frozen=True)
class WKV(MixingOp):
    """Averages of values weighted by exp(key): older ones decay by exp(-exp(w)) a row, the own one gains exp(first).

    Arguments: `k` and `v [tokens, inner]`; parameters `w` and `first [inner]`. Runs in float32 or wider, every
    sum kept beside the exponent that it is scaled by.
    """

    kind: ClassVar[str] = "wkv"

    @property
    def signals(self) -> int:
        return 2

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[inner]`; see `Op.infer`."""
        check_count(self.kind, args, ("k", "v", "the decay", "the first bonus"))
        for name, argument in zip(("v", "the decay", "the first bonus"), args[1:], strict=True):
            check_shape(self.kind, name, argument, args[0].shape)
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        dtype = xp.dtype_of(args[0])
        wide = wide_dtype(dtype)
        k, v, decay, first = (xp.cast(a, wide) for a in args)
        rate, width = -xp.exp(decay), int(k.shape[1])

        def joined(above: Array, below: Array, top: Array, k_t: Array, v_t: Array) -> tuple[Array, Array, Array]:
            """The two sums with one more term, and their common exponent."""
            highest = xp.where(top > k_t, top, k_t)
            old, new = xp.exp(top - highest), xp.exp(k_t - highest)
            return old * above + new * v_t, old * below + new, highest

        def step(state: Any, row: Any) -> tuple[Any, Array]:
            (above, below, top), (k_t, v_t) = state, row
            numerator, denominator, _ = joined(above, below, top, k_t + first, v_t)
            return joined(above, below, top + rate, k_t, v_t), numerator / denominator

        nothing = xp.asarray(np.zeros(width), wide)
        start = (nothing, nothing, xp.asarray(np.full(width, NOTHING), wide))
        return xp.cast(xp.scan(step, start, [k, v]), dtype)
