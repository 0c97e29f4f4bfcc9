"""Rotary position embedding (arXiv 2104.09864): its frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..arrays import Array, Arrays, wide_dtype
from ..sizes import Size

RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """Which coordinates of a head are rotated against each other, and how fast with the position.

    Attributes:
        base: wave lengths run from 2 pi to 2 pi * base.
        scaling: `linear`: positions are divided by it.
        dim: the first `dim` coordinates of a head are rotated, the others stay; None for all.
        interleaved: coordinates 2i and 2i + 1 form a pair (GPT-J) in place of i and i + dim/2 (GPT-NeoX).
        kind: how wave lengths that are longer than the first training's sequences are stretched: `linear` (by
            `scaling`, like all others), `llama3` (by `factor`), or `yarn` (by `factor`, arXiv 2309.00071).
        factor: by which the longest wave lengths are stretched.
        original_length: the first training's sequence length.
        low_freq_factor, high_freq_factor: `llama3`: wave lengths above original_length / low_freq_factor are
            stretched, those below original_length / high_freq_factor are not.
        beta_fast, beta_slow: `yarn`: waves that turn more than beta_fast times in original_length are not
            stretched, those that turn less than beta_slow times are.
        attention_factor: `yarn`: cosines and sines are multiplied by it; None for 0.1 log(factor) + 1.
        truncate: `yarn`: the ends of the ramp between the two are rounded outwards.
    """

    base: float = 10000.0
    scaling: float = 1.0
    dim: Size | None = None
    interleaved: bool = False
    kind: RopeKind = "linear"
    factor: float = 1.0
    original_length: float = 8192.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, dim: int, dtype: str) -> np.ndarray:
        """Radians a position, `[dim/2]`, for `dim` rotated coordinates."""
        powers = np.arange(0, dim, 2, dtype=dtype) / np.asarray(dim, dtype=dtype)
        plain = 1 / self.base**powers
        stretched: np.ndarray = {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn}[self.kind](plain)
        return stretched.astype(dtype)

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        grown = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return grown if self.attention_factor is None else self.attention_factor

    def _linear(self, plain: np.ndarray) -> np.ndarray:
        return np.asarray(plain / self.scaling)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_length * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(plain, plain / self.factor, np.clip(kept, 0, 1))

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        low, high = (self._pair_that_turns(turns, 2 * len(plain)) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, 2.0 * len(plain) - 1)
        ramp = (np.arange(len(plain)) - low) / (high - low if high != low else 1e-3)
        return _blend(plain, plain / self.factor, 1 - np.clip(ramp, 0, 1))

    def _pair_that_turns(self, turns: float, dim: int) -> float:
        """The index, a fraction, of the pair that turns so many times in `original_length`."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    def rotate(self, xp: Arrays, value: Array, positions: Array) -> Array:
        """`[heads, tokens, head_dim]`, every token's first `dim` coordinates turned by its angles."""
        width = int(value.shape[-1])
        dim = width if self.dim is None else int(self.dim.known or 0)
        turned, rest = (value, None) if dim == width else (value[:, :, :dim], value[:, :, dim:])
        cos, sin = self._angles(xp, positions, dim, xp.dtype_of(value))
        if self.interleaved:
            parts = [_interleaved(xp, turned, cos, sin)]
        else:
            a, b = turned[:, :, : dim // 2], turned[:, :, dim // 2 :]
            parts = [a * cos - b * sin, b * cos + a * sin]
        parts += [] if rest is None else [rest]
        return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=-1)

    def _angles(self, xp: Arrays, positions: Array, dim: int, dtype: str) -> tuple[Array, Array]:
        """Cosines and sines, `[tokens, dim/2]`."""
        wide = wide_dtype(dtype)
        frequencies = xp.asarray(self.frequencies(dim, wide), wide)
        angles = xp.cast(positions, wide)[:, None] * frequencies[None, :]
        cos, sin = xp.cos(angles), xp.sin(angles)
        if (amplitude := self.amplitude()) != 1.0:
            cos, sin = cos * amplitude, sin * amplitude
        return xp.cast(cos, dtype), xp.cast(sin, dtype)


def _blend(plain: np.ndarray, stretched: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.asarray(stretched * (1 - kept) + plain * kept)


def _interleaved(xp: Arrays, value: Array, cos: Any, sin: Any) -> Array:
    """Pairs (2i, 2i + 1) of `[heads, tokens, dim]` turned by `cos`, `sin [tokens, dim/2]`."""
    heads, tokens, dim = (int(s) for s in value.shape)
    pairs = xp.reshape(value, (heads, tokens, dim // 2, 2))
    a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
    both = [(a * cos - b * sin)[:, :, :, None], (b * cos + a * sin)[:, :, :, None]]
    return xp.reshape(xp.concatenate(both, axis=-1), (heads, tokens, dim))
