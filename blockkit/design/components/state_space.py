"""The mixers of Mamba and Mamba-2: a short convolution, a scan, a gate and an output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import BadInput
from ...graph.mixers import DualScan, SelectiveScan
from ...graph.ops import Activation, Concat, Multiply
from ...graph.ops import Add as AddOp
from ...graph.ops import RMSNorm as RMSNormOp
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal
from .mixers import convolve, split


@dataclass(frozen=True)
class Mamba(Component):
    """Mamba's mixer (arXiv 2312.00752).

    Args:
        inner: channels inside, usually twice the stream's width.
        state: numbers that the scan keeps for each channel.
        kernel: taps of the convolution.
        dt_rank: through how many numbers the time steps are projected.
        bias: biases on `in_proj` and `out_proj`.
        conv_bias: a bias on the convolution.
    """

    input: Signal
    inner: int | str
    state: int | str
    dt_rank: int | str
    kernel: int | str = 4
    bias: bool = False
    conv_bias: bool = True
    name: str = ""
    kind: ClassVar[str] = "mamba"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projections and gate as ordinary nodes around the convolution and the scan `NAME.scanned`."""
        width, inner, state = to.shapes[inputs[0]], to.size(self.inner), to.size(self.state)
        rank = to.size(self.dt_rank)
        both = to.linear(name, "in_proj", inputs[0], width, inner + inner, self.bias)
        rows, gate = split(to, name, both, {"u": inner, "z": inner})
        short = convolve(to, name, rows, inner, to.size(self.kernel), self.conv_bias)
        active = to.add(f"{name}.active", Activation("silu"), short)
        selected = to.linear(name, "x_proj", active, inner, rank + state + state, False)
        low, b, c = split(to, name, selected, {"dt_low": rank, "B": state, "C": state})
        time = to.linear(name, "dt_proj", low, rank, inner, True)
        stored = to.store(f"{name}.A_log", inner, state), to.store(f"{name}.D", inner)
        scanned = to.add(f"{name}.scanned", SelectiveScan(), active, time, b, c, *stored)
        opened = to.add(f"{name}.gate", Activation("silu"), gate)
        gated = to.add(f"{name}.gated", Multiply(), scanned, opened)
        return to.linear(name, "out_proj", gated, inner, width, self.bias)


@dataclass(frozen=True)
class Mamba2(Component):
    """Mamba-2's mixer (arXiv 2405.21060): one decay a head, and a gated RMSNorm before `out_proj`.

    Args:
        heads, head_dim: of the scan; heads*head_dim channels inside.
        state: numbers that the scan keeps for each channel.
        groups: how many B and C there are, and in how many parts the norm is taken.
        kernel: taps of the convolution over u, B and C.
        eps: of the norm.
        bias: biases on `in_proj` and `out_proj`.
        conv_bias: a bias on the convolution.
    """

    input: Signal
    heads: int | str
    head_dim: int | str
    state: int | str
    groups: int | str = 1
    kernel: int | str = 4
    eps: Number = 1e-5
    bias: bool = False
    conv_bias: bool = True
    name: str = ""
    kind: ClassVar[str] = "mamba2"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projection, convolution, the scan `NAME.scanned`, gate, norm with a scale, output projection."""
        width, heads, groups = to.shapes[inputs[0]], to.size(self.heads), to.size(self.groups)
        state, inner = to.size(self.state), heads * to.size(self.head_dim)
        read = groups * state
        mixed = inner + read + read
        together = to.linear(name, "in_proj", inputs[0], width, inner + mixed + heads, self.bias)
        gate, rows, low = split(to, name, together, {"z": inner, "uBC": mixed, "dt_low": heads})
        short = convolve(to, name, rows, mixed, to.size(self.kernel), self.conv_bias)
        active = to.add(f"{name}.active", Activation("silu"), short)
        u, b, c = split(to, name, active, {"u": inner, "B": read, "C": read})
        time = to.add(f"{name}.dt", AddOp(), low, to.store(f"{name}.dt_bias", heads))
        stored = to.store(f"{name}.A_log", heads), to.store(f"{name}.D", heads)
        scanned = to.add(f"{name}.scanned", DualScan(groups, state), u, time, b, c, *stored)
        opened = to.add(f"{name}.gate", Activation("silu"), gate)
        gated = to.add(f"{name}.gated", Multiply(), scanned, opened)
        normed = self._normed(to, name, gated, inner, groups)
        scaled = to.add(f"{name}.norm", Multiply(), normed, to.store(f"{name}.norm_scale", inner))
        return to.linear(name, "out_proj", scaled, inner, width, self.bias)

    def _normed(self, to: Lowering, name: str, value: str, inner: Size, groups: Size) -> str:
        """RMSNorm, of every group's part by itself."""
        norm, count = RMSNormOp(to.number(self.eps, f"{name}.eps")), groups.known
        if count == 1:
            return to.add(f"{name}.normed", norm, value)
        if count is None or inner.known is None or inner.known % count:
            raise BadInput(f"groups = {groups} must be a number that divides heads*head_dim = {inner}")
        part = Size.of(inner.known // count)
        parts = split(to, name, value, {f"gated_{i}": part for i in range(count)})
        normed = [to.add(f"{name}.normed_{i}", norm, p) for i, p in enumerate(parts)]
        return to.add(f"{name}.normed", Concat(), *normed)
