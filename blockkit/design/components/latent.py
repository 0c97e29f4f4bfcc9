"""Multi-head latent attention (DeepSeek-V2 and V3): queries, keys and values through narrow latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...graph.mixers.latent import LatentAttend
from ...graph.mixers.scoring import Scoring
from ...graph.ops import Multiply, RMSNorm, Slice
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal
from .head_settings import RopeSettings


@dataclass(frozen=True)
class LatentAttention(Component):
    """Attention with low-rank keys and values (arXiv 2405.04434), and its output projection `o_proj`.

    q = q_b_proj norm(q_a_proj x), keys and values = kv_b_proj norm(c), where kv_a_proj x = (c, the rotated part of
    the keys, which all heads share).

    Args:
        heads: how many.
        kv_rank: width of the latent c.
        q_rank: width of the queries' latent; None for one matrix `q_proj`.
        nope_dim, rope_dim: coordinates of a head's queries and keys without and with rotation.
        value_dim: coordinates of a head's values.
        rope: the rotation; DeepSeek's is interleaved.
        eps: of the two norms, whose scales are `q_a_norm` and `kv_a_norm`.
        scale: logits are multiplied by it; by default (nope_dim + rope_dim)^-1/2.
    """

    input: Signal
    heads: int | str
    kv_rank: int | str
    nope_dim: int | str
    rope_dim: int | str
    value_dim: int | str
    q_rank: int | str | None = None
    rope: RopeSettings = field(default_factory=RopeSettings)
    eps: Number = 1e-6
    scale: Number | None = None
    causal: bool = True
    name: str = ""
    kind: ClassVar[str] = "latent_attention"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Both latents, the mixing operation `NAME.heads`, and the output projection."""
        z, width = inputs[0], to.shapes[inputs[0]]
        op = self._op(to, name)
        widths, rank = op.signal_widths(), to.size(self.kv_rank)
        q = self._queries(to, name, z, width, widths["q"])
        both = to.linear(name, "kv_a_proj", z, width, rank + op.rope_dim, False)
        latent = to.add(f"{name}.latent", Slice(Size.of(0), rank), both)
        shared = to.add(f"{name}.k_rope", Slice(rank, rank + op.rope_dim), both)
        normed = self._normed(to, name, "kv_a_norm", latent, rank)
        kv = to.linear(name, "kv_b_proj", normed, rank, widths["kv"], False)
        mixed = to.add(f"{name}.heads", op, q, kv, shared)
        return to.linear(name, "o_proj", mixed, op.result(), width, False)

    def _queries(self, to: Lowering, name: str, z: str, width: Size, out: Size) -> str:
        if self.q_rank is None:
            return to.linear(name, "q_proj", z, width, out, False)
        rank = to.size(self.q_rank)
        latent = to.linear(name, "q_a_proj", z, width, rank, False)
        return to.linear(name, "q_b_proj", self._normed(to, name, "q_a_norm", latent, rank), rank, out, False)

    def _normed(self, to: Lowering, name: str, slot: str, value: str, width: Size) -> str:
        normed = to.add(f"{name}.{slot}.normed", RMSNorm(to.number(self.eps, f"{name}.eps")), value)
        return to.add(f"{name}.{slot}.scaled", Multiply(), normed, to.store(f"{name}.{slot}", width))

    def _op(self, to: Lowering, name: str) -> LatentAttend:
        nope, rotated = to.size(self.nope_dim), to.size(self.rope_dim)
        scale = None if self.scale is None else to.number(self.scale, f"{name}.scale")
        return LatentAttend(
            to.size(self.heads),
            nope,
            rotated,
            to.size(self.value_dim),
            Scoring(scale, nope + rotated, causal=self.causal),
            self.rope.op(to, f"{name}.rope", rotated),
        )
