"""Attention to another sequence, as in the decoder of an encoder-decoder model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...graph.mixers.cross_attention import CrossAttend
from ...graph.mixers.scoring import Scoring
from .attention import head_dim_of
from .base import Component, Lowering, Number, Signal


@dataclass(frozen=True)
class CrossAttention(Component):
    """Queries from the input, keys and values from the encoder's result; then the output projection `o_proj`.

    `k_proj` and `v_proj` belong to the operation that looks at the other sequence.

    Args:
        heads, kv_heads, head_dim, value_dim, scale_dim, scale: as in `attention`.
        memory_width: width of the encoder's result; by default the stream's.
        bias, out_bias: biases on q, k and v, and on o (by default as `bias`).
    """

    input: Signal
    heads: int | str
    kv_heads: int | str | None = None
    head_dim: int | str | None = None
    memory_width: int | str | None = None
    scale_dim: int | str | None = None
    scale: Number | None = None
    value_dim: int | str | None = None
    bias: bool = False
    out_bias: bool | None = None
    name: str = ""
    kind: ClassVar[str] = "cross_attention"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """The queries, the mixing operation `NAME.heads`, and the output projection.

        Raises:
            BadInput: sizes that do not fit each other.
        """
        width = to.shapes[inputs[0]]
        heads, head_dim = to.size(self.heads), head_dim_of(to, self.head_dim, self.heads, width)
        scale = None if self.scale is None else to.number(self.scale, f"{name}.scale")
        op = CrossAttend(
            heads,
            to.size(self.kv_heads) if self.kv_heads is not None else heads,
            head_dim,
            to.size(self.value_dim) if self.value_dim is not None else head_dim,
            to.size(self.memory_width) if self.memory_width is not None else width,
            Scoring(scale, to.size(self.scale_dim) if self.scale_dim is not None else head_dim, causal=False),
            self.bias,
        )
        q = to.linear(name, "q_proj", inputs[0], width, heads * head_dim, self.bias)
        stored = [to.store(f"{name}.{slot}", *shape) for slot, shape in op.stored().items()]
        mixed = to.add(f"{name}.heads", op, q, *stored)
        out_bias = self.bias if self.out_bias is None else self.out_bias
        return to.linear(name, "o_proj", mixed, op.result(), width, out_bias)
