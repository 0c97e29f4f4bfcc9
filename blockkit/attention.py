"""Multi-head attention as one mixing operation: rotary positions, grouped heads, windows, soft caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .arrays import Array, Arrays, wide_dtype
from .errors import BadInput
from .layout import Layout, Past
from .ops import Argument, Op, RMSNorm, Shape
from .sizes import Size

MOST_SCORES = 1 << 26  # attention scores held at a time; longer sequences go in slices of queries


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other.

    Attributes:
        base: wave lengths run from 2 pi to 2 pi * base.
        scaling: positions are divided by it (linear scaling).
    """

    base: float = 10000.0
    scaling: float = 1.0


@dataclass(frozen=True)
class Attend(Op):
    """softmax(q k^T / sqrt(scale_dim)) v, per head, over the tokens that the query may see.

    Arguments: `q [tokens, heads*head_dim]`, `k` and `v [tokens, kv_heads*head_dim]`, and with
    `qk_norm` the scales `[head_dim]` of the query's and the key's RMSNorm.
    """

    heads: Size
    kv_heads: Size
    head_dim: Size
    scale_dim: Size
    rope: Rope | None = None
    qk_norm: RMSNorm | None = None
    qk_offset: float = 0.0
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    kind: ClassVar[str] = "attend"
    mixing: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[heads*head_dim]`; see `Op.infer`."""
        wanted = 5 if self.qk_norm else 3
        if len(args) != wanted:
            raise BadInput(f"attend takes {wanted} arguments, got {len(args)}")
        widths = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
        for name, argument, width in zip("qkv", args, widths, strict=False):
            if argument.width != width:
                raise BadInput(f"attend: {name} must have width {width}, got {argument.width}")
        heads, kv_heads = self.heads.known, self.kv_heads.known
        if heads is not None and kv_heads and heads % kv_heads:
            raise BadInput(f"attend: {heads} heads cannot share {kv_heads} key-value heads evenly")
        return (self.heads * self.head_dim,)

    def may_vanish(self, vanishing: Sequence[bool]) -> bool:
        return False

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return self.attend(xp, args, layout, None)

    def attend(self, xp: Arrays, args: Sequence[Any], layout: Layout, past: Past | None) -> Array:
        """The attention of each segment's rows over its own rows; the first also sees those of `past`."""
        scales = args[3:] if self.qk_norm else (None, None)
        q = self._prepare(xp, args[0], layout.positions, self._int("heads"), scales[0])
        k_rows, v_rows, k_at, before = args[1], args[2], layout.positions, 0
        if past is not None:
            before = int(past.positions.shape[0])
            k_rows = xp.concatenate([past.args[1], k_rows], axis=0)
            v_rows = xp.concatenate([past.args[2], v_rows], axis=0)
            k_at = xp.concatenate([past.positions, k_at], axis=0)
        k = self._prepare(xp, k_rows, k_at, self._int("kv_heads"), scales[1])
        v = self._heads(xp, v_rows, self._int("kv_heads"))
        out, start = [], 0
        for number, rows in enumerate(layout.segments):
            mine = slice(start, start + rows)
            seen = slice(before + start if number else 0, before + start + rows)
            out.append(self._rows(xp, q[:, mine], k[:, seen], v[:, seen], layout.positions[mine], k_at[seen]))
            start += rows
        return out[0] if len(out) == 1 else xp.concatenate(out, axis=0)

    def _int(self, name: str) -> int:
        value: Size = getattr(self, name)
        if value.known is None:
            raise BadInput(f"attend: {name} = {value} has no number yet; bind it before running")
        return value.known

    def _heads(self, xp: Arrays, rows: Array, heads: int) -> Array:
        """`[tokens, heads*head_dim]` -> `[heads, tokens, head_dim]`."""
        split = xp.reshape(rows, (rows.shape[0], heads, self._int("head_dim")))
        return xp.transpose(split, (1, 0, 2))

    def _prepare(self, xp: Arrays, rows: Array, positions: Array, heads: int, scale: Any) -> Array:
        value = self._heads(xp, rows, heads)
        if self.qk_norm is not None:
            value = self.qk_norm.forward(xp, [value], Layout(positions, ()))
            value = value * (scale + self.qk_offset if self.qk_offset else scale)
        return self._rotate(xp, value, positions) if self.rope else value

    def _rotate(self, xp: Arrays, value: Array, positions: Array) -> Array:
        """Rotates the halves of `[heads, tokens, head_dim]` by each token's angles."""
        rope, dim, dtype = self.rope or Rope(), self._int("head_dim"), xp.dtype_of(value)
        wide = wide_dtype(dtype)
        powers = np.arange(0, dim, 2, dtype=wide) / np.asarray(dim, dtype=wide)
        frequencies = (1 / rope.base**powers / rope.scaling).astype(wide)
        angles = xp.cast(positions, wide)[:, None] * xp.asarray(frequencies, wide)[None, :]
        cos, sin = xp.cast(xp.cos(angles), dtype), xp.cast(xp.sin(angles), dtype)
        a, b = value[:, :, : dim // 2], value[:, :, dim // 2 :]
        return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _rows(self, xp: Arrays, q: Array, k: Array, v: Array, q_at: Array, k_at: Array) -> Array:
        """One sequence: `q [heads, n, head_dim]`, `k`, `v [kv_heads, m, head_dim]` -> `[n, heads*head_dim]`."""
        n, m, heads = int(q.shape[1]), int(k.shape[1]), int(q.shape[0])
        step = max(1, MOST_SCORES // max(1, heads * m))
        parts = [self._slice(xp, q[:, i : i + step], k, v, q_at[i : i + step], k_at) for i in range(0, n, step)]
        return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=0)

    def _slice(self, xp: Arrays, q: Array, k: Array, v: Array, q_at: Array, k_at: Array) -> Array:
        heads, n, dim = (int(s) for s in q.shape)
        groups, m = int(k.shape[0]), int(k.shape[1])
        dtype = xp.dtype_of(q)
        stacked = xp.reshape(q, (groups, heads // groups * n, dim))
        scores = xp.matmul(stacked, xp.transpose(k, (0, 2, 1))) * self._int("scale_dim") ** -0.5
        scores = xp.cast(xp.reshape(scores, (groups, heads // groups, n, m)), wide_dtype(dtype))
        if self.softcap is not None:
            scores = self.softcap * xp.tanh(scores / self.softcap)
        if (seen := self._mask(q_at, k_at)) is not None:
            scores = xp.where(seen[None, None], scores, -1e30)
        weights = xp.cast(xp.softmax(scores), dtype)
        out = xp.matmul(xp.reshape(weights, (groups, heads // groups * n, m)), v)
        out = xp.transpose(xp.reshape(out, (heads, n, dim)), (1, 0, 2))
        return xp.reshape(out, (n, heads * dim))

    def _mask(self, q_at: Array, k_at: Array) -> Array | None:
        """`[n, m]` booleans: the keys each query may see."""
        distance = q_at[:, None] - k_at[None, :]
        if not self.causal:
            return None if self.window is None else (distance < self.window) & (distance > -self.window)
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)
