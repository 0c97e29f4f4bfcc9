"""Multi-head latent attention as one mixing operation: keys of all heads share their rotated part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..arrays import Array, Arrays
from ..sizes import Size
from .attention import HeadsOp, Stored, by_head
from .rotary import Rope
from .scoring import Scoring


@dataclass(frozen=True)
class LatentAttend(HeadsOp):
    """Attention whose keys share one rotated part (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434).

    A head's query and key are its own `nope_dim` coordinates, without position, and `rope_dim` rotated ones, which
    all keys of a token have in common. Arguments: `q [tokens, heads*(nope_dim + rope_dim)]`,
    `kv [tokens, heads*(nope_dim + value_dim)]` (each head's key, then its value), `k_rope [tokens, rope_dim]`.
    """

    heads: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    scoring: Scoring
    rope: Rope
    kind: ClassVar[str] = "latent_attend"

    def signal_widths(self) -> dict[str, Size]:
        queries, pairs = self.nope_dim + self.rope_dim, self.nope_dim + self.value_dim
        return {"q": self.heads * queries, "kv": self.heads * pairs, "k_rope": self.rope_dim}

    def result(self) -> Size:
        return self.heads * self.value_dim

    def queries(self, xp: Arrays, rows: Array, positions: Array, stored: Stored) -> Array:
        q, own = by_head(xp, rows, self.number("heads")), self.number("nope_dim")
        return xp.concatenate([q[:, :, :own], self.rope.rotate(xp, q[:, :, own:], positions)], axis=-1)

    def keys_values(self, xp: Arrays, rows: Sequence[Array], positions: Array, stored: Stored) -> tuple[Array, Array]:
        kv, own = by_head(xp, rows[0], self.number("heads")), self.number("nope_dim")
        shared = self.rope.rotate(xp, rows[1][None], positions)
        rotated = xp.concatenate([shared] * self.number("heads"), axis=0)
        return xp.concatenate([kv[:, :, :own], rotated], axis=-1), kv[:, :, own:]
