"""From logits to attention weights: which keys a query sees, position biases, soft caps and sinks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import BadInput
from ..arrays import Array, Arrays, wide_dtype
from ..sizes import Size

MOST_SCORES = 1 << 26  # attention scores held at a time; longer sequences go in slices of queries
HIDDEN = -1e30  # the logit of a key that the query does not see
Alibi = bool | Literal["scaled"]


@dataclass(frozen=True)
class RelativeBias:
    """A learned logit for every head and bucket of distances (T5, arXiv 1910.10683).

    Half of the buckets hold one distance each, the others ranges that grow up to `max_distance`. Attention that
    sees later tokens has half of all buckets for those.
    """

    buckets: Size
    max_distance: Size

    @property
    def furthest(self) -> int:
        if self.max_distance.known is None:
            raise BadInput(f"max_distance = {self.max_distance} has no number yet; bind it before running")
        return self.max_distance.known

    def table(self, causal: bool) -> np.ndarray:
        """Buckets `[2*max_distance + 1]` of key minus query from -max_distance to max_distance."""
        offset = np.arange(-self.furthest, self.furthest + 1)
        distance = np.maximum(-offset, 0) if causal else np.abs(offset)
        count = (self.buckets.known or 0) // (1 if causal else 2)
        exact = count // 2
        far = np.maximum(distance, 1).astype("float32") / np.float32(exact)  # as T5: the ends of ranges are float32's
        grown = np.log(far) / np.float32(math.log(self.furthest / exact)) * np.float32(count - exact)
        bucket = np.where(distance < exact, distance, np.minimum(exact + grown.astype("int32"), count - 1))
        return bucket if causal else bucket + count * (offset > 0)


@dataclass(frozen=True)
class Scoring:
    """How a query weighs the values of the keys that it sees.

    Attributes:
        scale: logits are multiplied by it; None for `scale_dim ** -0.5`.
        scale_dim: see `scale`.
        causal: a query sees no key after it.
        window: how many tokens back (and, unless causal, ahead) a query sees, itself included; None for all.
        chunk: queries see only keys of their own chunk of so many positions; None for all.
        softcap: logits are capped to cap * tanh(logit / cap).
        alibi: logits fall linearly with the distance (arXiv 2108.12409); `scaled`: the slopes are multiplied by
            the logits' scale, too (Falcon).
        relative: see `RelativeBias`; its parameter is `rel_bias [buckets, heads]`.
        sinks: a learned logit for each head, `sinks [heads]`, joins the softmax without a value.
    """

    scale: float | None
    scale_dim: Size
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: Alibi = False
    relative: RelativeBias | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        for name in ("softcap", "window", "chunk"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise BadInput(f"{name} must be positive, got {value:g}")

    def stored(self, heads: Size) -> dict[str, tuple[Size, ...]]:
        """The parameters that it needs, with their shapes."""
        found: dict[str, tuple[Size, ...]] = {}
        if self.relative:
            found["rel_bias"] = (self.relative.buckets, heads)
        if self.sinks:
            found["sinks"] = (heads,)
        return found

    @property
    def factor(self) -> float:
        if self.scale is not None:
            return self.scale
        if self.scale_dim.known is None:
            raise BadInput(f"scale_dim = {self.scale_dim} has no number yet; bind it before running")
        return float(self.scale_dim.known**-0.5)

    def read(
        self, xp: Arrays, q: Array, k: Array, v: Array, q_at: Array, k_at: Array, stored: Mapping[str, Any]
    ) -> Array:
        """What the queries of one sequence read.

        Args:
            q: `[heads, n, head_dim]`.
            k, v: `[kv_heads, m, head_dim]`, `[kv_heads, m, value_dim]`.
            q_at, k_at: positions, `[n]` and `[m]`.
            stored: the parameters of `stored`.

        Returns:
            `[n, heads*value_dim]`.
        """
        n, m, heads = int(q.shape[1]), int(k.shape[1]), int(q.shape[0])
        step = max(1, MOST_SCORES // max(1, heads * m))
        parts = [
            self._slice(xp, q[:, i : i + step], k, v, None if q_at is None else q_at[i : i + step], k_at, stored)
            for i in range(0, n, step)
        ]
        return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=0)

    def _slice(
        self, xp: Arrays, q: Array, k: Array, v: Array, q_at: Array, k_at: Array, stored: Mapping[str, Any]
    ) -> Array:
        heads, n, dim = (int(s) for s in q.shape)
        groups, m = int(k.shape[0]), int(k.shape[1])
        dtype = xp.dtype_of(q)
        stacked = xp.reshape(q, (groups, heads // groups * n, dim))
        logits = xp.matmul(stacked, xp.transpose(k, (0, 2, 1))) * self.factor
        logits = xp.cast(xp.reshape(logits, (groups, heads // groups, n, m)), wide_dtype(dtype))
        weights = xp.cast(self._weights(xp, logits, q_at, k_at, stored), dtype)
        out = xp.matmul(xp.reshape(weights, (groups, heads // groups * n, m)), v)
        out = xp.transpose(xp.reshape(out, (heads, n, int(v.shape[2]))), (1, 0, 2))
        return xp.reshape(out, (n, heads * int(v.shape[2])))

    def _weights(self, xp: Arrays, logits: Array, q_at: Array, k_at: Array, stored: Mapping[str, Any]) -> Array:
        """`[groups, heads/groups, n, m]` logits to weights."""
        if self.softcap is not None:
            logits = self.softcap * xp.tanh(logits / self.softcap)
        if (bias := self._bias(xp, xp.dtype_of(logits), q_at, k_at, logits, stored)) is not None:
            logits = logits + xp.reshape(bias, logits.shape)
        if (seen := self._mask(q_at, k_at)) is not None:
            logits = xp.where(seen[None, None], logits, HIDDEN)
        if not self.sinks:
            return xp.softmax(logits)
        sinks = xp.reshape(xp.cast(stored["sinks"], xp.dtype_of(logits)), (*logits.shape[:2], 1, 1))
        column = logits[:, :, :, :1] * 0 + sinks
        return xp.softmax(xp.concatenate([logits, column], axis=-1))[:, :, :, :-1]

    def _bias(
        self, xp: Arrays, dtype: str, q_at: Array, k_at: Array, logits: Array, stored: Mapping[str, Any]
    ) -> Array | None:
        """What is added to the logits by distance, `[heads, n, m]`."""
        if not self.alibi and self.relative is None:
            return None
        offset = k_at[None, :] - q_at[:, None]
        if self.relative is None:
            heads = int(logits.shape[0]) * int(logits.shape[1])
            slopes = alibi_slopes(heads) * (self.factor if self.alibi == "scaled" else 1.0)
            behind = xp.cast(xp.maximum(offset, 0) + xp.maximum(-offset, 0), dtype)
            return -behind[None] * xp.asarray(slopes, dtype)[:, None, None]
        furthest = self.relative.furthest
        table = xp.asarray(self.relative.table(self.causal), "int32")
        by_offset = xp.take_rows(stored["rel_bias"], table)
        near = xp.maximum(offset, -furthest)
        held = -xp.maximum(-near, -furthest) + furthest
        return xp.cast(xp.transpose(xp.take_rows(by_offset, held), (2, 0, 1)), dtype)

    def _mask(self, q_at: Array, k_at: Array) -> Array | None:
        """`[n, m]` booleans: the keys each query may see; None for all."""
        if not self.causal and self.window is None and self.chunk is None:
            return None
        distance = q_at[:, None] - k_at[None, :]
        if self.causal:
            seen = distance >= 0
            seen = seen if self.window is None else seen & (distance < self.window)
        else:
            reach = self.window if self.window is not None else 1 << 30
            seen = (distance < reach) & (distance > -reach)
        if self.chunk is None:
            return seen
        return seen & (q_at[:, None] // self.chunk == k_at[None, :] // self.chunk)


def alibi_slopes(heads: int) -> np.ndarray:
    """`[heads]`: the slopes of ALiBi (arXiv 2108.12409), for any number of heads."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, between])
