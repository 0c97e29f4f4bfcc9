"""Multi-head attention with its projections, as people set it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import BadInput
from ...graph.mixers.attention import Attend
from ...graph.mixers.scoring import Alibi, Scoring
from ...graph.ops import Slice
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal
from .head_settings import QKNorm, RelativeBiasSettings, RopeSettings

Projections = tuple[Literal["q", "k", "v"], ...]


@dataclass(frozen=True)
class Attention(Component):
    """Multi-head attention over the sequence, and its output projection `o_proj`.

    Args:
        heads, kv_heads, head_dim: `kv_heads` below `heads` is grouped-query attention; by default
            there are as many as heads, and head_dim is the stream's width over the heads.
        rope: rotary positions; None for none.
        qk_norm: a norm of queries and keys; None for none.
        window: how many tokens back a query sees, itself included; None for all.
        softcap: attention logits are capped to cap * tanh(logit / cap).
        scale_dim: logits are divided by its square root; by default `head_dim`.
        bias, out_bias: biases on q, k, v (all, or those that are listed) and on o (by default as `bias`).
        fused: q, k and v come from one matrix `qkv_proj` (GPT-2's `c_attn`).
        causal: a query sees no token after it.
        value_dim: coordinates of a head's values; by default `head_dim`.
        scale: logits are multiplied by it, in place of `scale_dim`.
        clip: q, k and v are held between -clip and clip.
        alibi: logits fall with the distance, by slopes that follow from the number of heads (ALiBi); `scaled`:
            times the logits' scale.
        relative_bias: a learned logit by distance (T5); None for none.
        sinks: a learned logit for each head, `sinks`, joins the softmax (gpt-oss).
        chunk: queries see only their own chunk of so many tokens; None for all.
        out_proj: false leaves `o_proj` out: the result is heads*value_dim wide.
    """

    input: Signal
    heads: int | str
    kv_heads: int | str | None = None
    head_dim: int | str | None = None
    rope: RopeSettings | None = None
    qk_norm: QKNorm | None = None
    window: int | str | None = None
    softcap: Number | None = None
    scale_dim: int | str | None = None
    bias: bool | Projections = False
    out_bias: bool | None = None
    fused: bool = False
    causal: bool = True
    value_dim: int | str | None = None
    scale: Number | None = None
    clip: Number | None = None
    alibi: Alibi = False
    relative_bias: RelativeBiasSettings | None = None
    sinks: bool = False
    chunk: int | str | None = None
    out_proj: bool = True
    name: str = ""
    kind: ClassVar[str] = "attention"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return inputs[0] if self.out_proj else to.size(self.heads) * self._value_dim(to, inputs[0])

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projections, the mixing operation `NAME.heads`, and the output projection."""
        width = to.shapes[inputs[0]]
        op = self._op(to, name, width)
        args = self._projections(to, name, inputs[0], width, op)
        args += [to.store(f"{name}.{slot}", *shape) for slot, shape in op.stored().items()]
        mixed = to.add(f"{name}.heads", op, *args)
        if not self.out_proj:
            return mixed
        out_bias = self.bias is True if self.out_bias is None else self.out_bias
        return to.linear(name, "o_proj", mixed, op.result(), width, out_bias)

    def _projections(self, to: Lowering, name: str, z: str, d_in: Size, op: Attend) -> list[str]:
        widths = op.signal_widths()
        biased = set("qkv" if self.bias is True else self.bias or ())
        if not self.fused:
            return [to.linear(name, f"{part}_proj", z, d_in, w, part in biased) for part, w in widths.items()]
        if len(biased) not in (0, 3):
            raise BadInput("bias: one fused matrix has a bias for all of q, k and v, or none")
        total = widths["q"] + widths["k"] + widths["v"]
        together, start, parts = to.linear(name, "qkv_proj", z, d_in, total, bool(biased)), Size.of(0), []
        for part, w in widths.items():
            parts.append(to.add(f"{name}.{part}", Slice(start, start + w), together))
            start = start + w
        return parts

    def _op(self, to: Lowering, name: str, width: Size) -> Attend:
        heads, head_dim = to.size(self.heads), head_dim_of(to, self.head_dim, self.heads, width)
        return Attend(
            heads,
            to.size(self.kv_heads) if self.kv_heads is not None else heads,
            head_dim,
            self._value_dim(to, width),
            Scoring(
                scale=None if self.scale is None else to.number(self.scale, f"{name}.scale"),
                scale_dim=to.size(self.scale_dim) if self.scale_dim is not None else head_dim,
                causal=self.causal,
                window=None if self.window is None else to.size(self.window).known,
                chunk=None if self.chunk is None else to.size(self.chunk).known,
                softcap=None if self.softcap is None else to.number(self.softcap, f"{name}.softcap"),
                alibi=self.alibi,
                relative=None if self.relative_bias is None else self.relative_bias.op(to, self.causal),
                sinks=self.sinks,
            ),
            rope=None if self.rope is None else self.rope.op(to, f"{name}.rope", head_dim),
            norm=None if self.qk_norm is None else self.qk_norm.op(to, f"{name}.qk_norm"),
            clip=None if self.clip is None else to.number(self.clip, f"{name}.clip"),
        )

    def _value_dim(self, to: Lowering, width: Size) -> Size:
        if self.value_dim is not None:
            return to.size(self.value_dim)
        return head_dim_of(to, self.head_dim, self.heads, width)


def head_dim_of(to: Lowering, given: int | str | None, heads: int | str, width: Size) -> Size:
    """The given size, or the width over the heads.

    Raises:
        BadInput: it is not given and the width over the heads is no known whole number.
    """
    if given is not None:
        return to.size(given)
    count = to.size(heads)
    if width.known is None or count.known is None:
        raise BadInput("head_dim must be given while the width or the heads are symbols")
    if not count.known or width.known % count.known:
        raise BadInput(f"{count} heads do not divide the width {width}; give head_dim")
    return Size.of(width.known // count.known)
