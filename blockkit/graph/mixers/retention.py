"""Multi-scale retention (RetNet, arXiv 2307.08621): attention without a softmax, with a fixed decay for every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import BadInput
from ..arrays import Array, Arrays, wide_dtype
from ..ops import Argument, Shape
from ..ops.mixing import MixingOp
from ..sizes import Size
from .checks import check_count, check_shape
from .scoring import MOST_SCORES


@dataclass(frozen=True)
class Retain(MixingOp):
    """Per head: rms_norm((Q K^T * D) V), D_nm = g^(n - m) for n >= m, g = 1 - 2^(-5 - head), n and m positions.

    Arguments: `q` and `k [tokens, heads*head_dim]`, `v [tokens, heads*value_dim]`. Queries and keys are rotated by
    their positions, neighbouring coordinates against each other, at wave lengths from 2 pi to 2 pi * base.
    """

    heads: Size
    base: float = 10000.0
    eps: float = 1e-6
    kind: ClassVar[str] = "retain"

    @property
    def signals(self) -> int:
        return 3

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[heads*value_dim]`; see `Op.infer`."""
        check_count(self.kind, args, ("q", "k", "v"))
        check_shape(self.kind, "k", args[1], args[0].shape)
        heads = self.heads.known
        for name, argument, part in (("q", args[0], 2), ("v", args[2], 1)):
            width = argument.width.known
            if heads and width is not None and width % (heads * part):
                even = "even widths" if part == 2 else "equal widths"
                raise BadInput(f"{self.kind}: {heads} heads cannot share the width {width} of {name} in {even}")
        return args[2].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        dtype, heads = xp.dtype_of(args[0]), self.heads.known
        if heads is None:
            raise BadInput(f"{self.kind}: heads = {self.heads} has no number yet; bind it before running")
        wide, n = wide_dtype(dtype), int(args[0].shape[0])
        q, k, v = (self._split(xp, xp.cast(a, wide), heads) for a in args)
        at = xp.cast(positions, wide)
        q, k = self._rotated(xp, q, at), self._rotated(xp, k, at) * int(k.shape[2]) ** -0.5
        step = max(1, MOST_SCORES // (heads * n))
        parts = [self._rows(xp, q[:, i : i + step], k, v, at[i : i + step], at) for i in range(0, n, step)]
        out = parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)
        normed = out * xp.rsqrt(xp.mean(out * out) + self.eps)
        return xp.cast(xp.reshape(xp.transpose(normed, (1, 0, 2)), (n, int(args[2].shape[1]))), dtype)

    def _split(self, xp: Arrays, rows: Array, heads: int) -> Array:
        """`[tokens, heads*dim]` -> `[heads, tokens, dim]`."""
        n, width = (int(s) for s in rows.shape)
        return xp.transpose(xp.reshape(rows, (n, heads, width // heads)), (1, 0, 2))

    def _rotated(self, xp: Arrays, value: Array, at: Array) -> Array:
        """Turns neighbouring pairs of `[heads, tokens, head_dim]` by each token's angles."""
        heads, n, dim = (int(s) for s in value.shape)
        frequencies = xp.asarray(self.base ** -np.linspace(0, 1, dim // 2), xp.dtype_of(value))
        angles = at[:, None] * frequencies[None, :]
        cos, sin = xp.cos(angles), xp.sin(angles)
        pairs = xp.reshape(value, (heads, n, dim // 2, 2))
        a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
        turned = [(a * cos - b * sin)[:, :, :, None], (b * cos + a * sin)[:, :, :, None]]
        return xp.reshape(xp.concatenate(turned, axis=-1), (heads, n, dim))

    def _rows(self, xp: Arrays, q: Array, k: Array, v: Array, q_at: Array, k_at: Array) -> Array:
        """Some queries `[heads, rows, head_dim]` over all keys and values: `[heads, rows, value_dim]`."""
        heads = np.arange(int(q.shape[0]))
        rates = xp.asarray(np.log1p(-(2.0 ** (-5 - heads)))[:, None, None], xp.dtype_of(q))
        back = q_at[:, None] - k_at[None, :]
        decay = xp.where(back >= 0, xp.exp(rates * xp.maximum(back, 0.0)[None]), 0.0)
        return xp.matmul(xp.matmul(q, xp.transpose(k, (0, 2, 1))) * xp.cast(decay, xp.dtype_of(q)), v)
