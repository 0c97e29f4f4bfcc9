"""Causal convolution along the sequence, every channel by itself: a few taps, or a filter as long as the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays import Array, Arrays
from ..ops import Argument, Shape
from ..ops.mixing import MixingOp
from .checks import check_count, check_matrix, check_shape

UNROLLED = 16  # more taps than these are stepped through, so that a compiled program does not grow with the filter


@dataclass(frozen=True)
class CausalConvolution(MixingOp):
    """y_t = sum_j w[:, K - 1 - j] * u_{t-j} (+ b), over a token's own row and the K - 1 rows before it.

    Arguments: `u [tokens, width]`, the filter `w [width, K]` whose last column meets the token itself (as in
    PyTorch's `Conv1d`), and a bias `b [width]` if there is one. Rows follow each other whatever their positions;
    what stands before the first row counts as zero.
    """

    kind: ClassVar[str] = "causal_convolution"

    @property
    def signals(self) -> int:
        return 1

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[width]`; see `Op.infer`."""
        check_count(self.kind, args, ("a signal", "a filter", "a bias"), optional=1)
        check_matrix(self.kind, "the filter", args[1])
        check_shape(self.kind, "the filter", args[1], (args[0].width, args[1].shape[1]))
        if len(args) == 3:
            check_shape(self.kind, "the bias", args[2], args[0].shape)
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        rows, weight = args[0], args[1]
        length, taps = int(weight.shape[1]), min(int(weight.shape[1]), int(rows.shape[0]))
        near = weight[:, length - taps :]
        out = _shifted_sums(xp, rows, near) if taps <= UNROLLED else _stepped(xp, rows, near)
        return out + args[2] if len(args) == 3 else out


def _shifted_sums(xp: Arrays, rows: Array, weight: Array) -> Array:
    """One product for each tap: `rows [n, width]`, `weight [width, taps]` -> `[n, width]`."""
    (n, width), taps = (int(s) for s in rows.shape), int(weight.shape[1])
    padded = xp.concatenate([xp.asarray(np.zeros((taps - 1, width)), xp.dtype_of(rows)), rows], axis=0)
    total = padded[:n] * weight[:, 0]
    for tap in range(1, taps):
        total = total + padded[tap : tap + n] * weight[:, tap]
    return total


def _stepped(xp: Arrays, rows: Array, weight: Array) -> Array:
    """The same, one token at a time over a buffer of the latest rows, `[width, taps]`."""
    width, taps = (int(s) for s in weight.shape)

    def step(latest: Array, row: Any) -> tuple[Array, Array]:
        latest = xp.concatenate([latest[:, 1:], xp.reshape(row[0], (width, 1))], axis=1)
        return latest, xp.reshape(xp.mean(latest * weight) * taps, (width,))

    return xp.scan(step, xp.asarray(np.zeros((width, taps)), xp.dtype_of(rows)), [rows])
