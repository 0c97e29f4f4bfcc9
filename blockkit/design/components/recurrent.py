"""The mixers of RWKV and RetNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...graph.mixers import WKV, Retain, TokenShift
from ...graph.ops import Activation, Multiply
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal


def _shifted(to: Lowering, name: str, part: str, value: str, width: Size) -> str:
    """The token's own row mixed with the one before it, as `part` of the component wants it."""
    return to.add(f"{name}.{part}_shifted", TokenShift(), value, to.store(f"{name}.mix_{part}", width))


def _receptance(to: Lowering, name: str, value: str, width: Size, out: Size) -> str:
    """The gate sigmoid(receptance(shifted row))."""
    asked = to.linear(name, "receptance", _shifted(to, name, "receptance", value, width), width, out, False)
    return to.add(f"{name}.gate", Activation("sigmoid"), asked)


@dataclass(frozen=True)
class TimeMix(Component):
    """RWKV's time mixing (version 4, arXiv 2305.13048): output(sigmoid(receptance) * wkv(key, value)).

    Args:
        inner: channels of the recurrence; by default the stream's width.
    """

    input: Signal
    inner: int | str | None = None
    name: str = ""
    kind: ClassVar[str] = "time_mix"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Three token shifts, projections, the recurrence `NAME.wkv`, gate, output projection."""
        width = to.shapes[inputs[0]]
        inner = width if self.inner is None else to.size(self.inner)
        k, v = (
            to.linear(name, part, _shifted(to, name, part, inputs[0], width), width, inner, False)
            for part in ("key", "value")
        )
        gate = _receptance(to, name, inputs[0], width, inner)
        stored = to.store(f"{name}.decay", inner), to.store(f"{name}.first", inner)
        mixed = to.add(f"{name}.wkv", WKV(), k, v, *stored)
        gated = to.add(f"{name}.gated", Multiply(), gate, mixed)
        return to.linear(name, "output", gated, inner, width, False)


@dataclass(frozen=True)
class ChannelMix(Component):
    """RWKV's channel mixing: sigmoid(receptance) * value(relu(key)^2), on rows mixed with the row before."""

    input: Signal
    hidden: int | str
    name: str = ""
    kind: ClassVar[str] = "channel_mix"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Two token shifts, a plain MLP `key`, `value` with a squared ReLU, and the gate."""
        width, hidden = to.shapes[inputs[0]], to.size(self.hidden)
        key = to.linear(name, "key", _shifted(to, name, "key", inputs[0], width), width, hidden, False)
        active = to.add(f"{name}.hidden", Activation("relu2"), key)
        value = to.linear(name, "value", active, hidden, width, False)
        gate = _receptance(to, name, inputs[0], width, width)
        return to.add(name, Multiply(), gate, value)


@dataclass(frozen=True)
class Retention(Component):
    """RetNet's gated multi-scale retention (arXiv 2307.08621): o_proj(silu(g_proj x) * retained).

    Args:
        heads, head_dim: of queries and keys.
        value_dim: of the values, by head; usually twice head_dim.
        base: wave lengths of the rotation run from 2 pi to 2 pi * base.
        eps: of the norm of each head's result.
    """

    input: Signal
    heads: int | str
    head_dim: int | str
    value_dim: int | str
    base: Number = 10000.0
    eps: Number = 1e-6
    name: str = ""
    kind: ClassVar[str] = "retention"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projections, the mixing operation `NAME.heads` with its norm, the gate, the output projection."""
        width, z, heads = to.shapes[inputs[0]], inputs[0], to.size(self.heads)
        inner, values = heads * to.size(self.head_dim), heads * to.size(self.value_dim)
        widths = {"q_proj": inner, "k_proj": inner, "v_proj": values, "g_proj": values}
        q, k, v, g = (to.linear(name, slot, z, width, out, False) for slot, out in widths.items())
        op = Retain(heads, to.number(self.base, f"{name}.base"), to.number(self.eps, f"{name}.eps"))
        retained = to.add(f"{name}.heads", op, q, k, v)
        gate = to.add(f"{name}.gate", Activation("silu"), g)
        gated = to.add(f"{name}.gated", Multiply(), gate, retained)
        return to.linear(name, "o_proj", gated, values, width, False)
