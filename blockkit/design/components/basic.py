"""Single operations as components: norms, linear maps, activations, scales and shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...graph.ops import Activation as ActivationOp
from ...graph.ops import Add as AddOp
from ...graph.ops import Concat as ConcatOp
from ...graph.ops import LayerNorm as LayerNormOp
from ...graph.ops import Multiply, Op
from ...graph.ops import RMSNorm as RMSNormOp
from ...graph.ops import Scale as ScaleOp
from ...graph.ops import Slice as SliceOp
from ...graph.ops import Softcap as SoftcapOp
from ...graph.ops import Softmax as SoftmaxOp
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal


@dataclass(frozen=True)
class Scale(Component):
    """A signal times a known number."""

    input: Signal
    alpha: Number
    name: str = ""
    kind: ClassVar[str] = "scale"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, ScaleOp(to.number(self.alpha, f"{name}.alpha")), *inputs)


@dataclass(frozen=True)
class RMSNorm(Component):
    """x / sqrt(mean(x^2) + eps), times (offset + scale) unless `scale` is false."""

    input: Signal
    eps: Number = 1e-6
    scale: bool = True
    offset: float = 0.0
    name: str = ""
    kind: ClassVar[str] = "rms_norm"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        op = RMSNormOp(to.number(self.eps, f"{name}.eps"))
        if not self.scale:
            return to.add(name, op, *inputs)
        normed = to.add(f"{name}.normed", op, *inputs)
        return to.add(name, Multiply(self.offset), normed, to.store(f"{name}.scale", to.shapes[inputs[0]]))


@dataclass(frozen=True)
class LayerNorm(Component):
    """(x - mean) / sqrt(var + eps), times (offset + `scale`), plus `bias`, where they are there."""

    input: Signal
    eps: Number = 1e-5
    scale: bool = True
    bias: bool = True
    offset: float = 0.0
    name: str = ""
    kind: ClassVar[str] = "layer_norm"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """The norm, then the scale, then the bias, as far as they are there; the last has the component's name."""
        width = to.shapes[inputs[0]]
        stages: list[tuple[Op, str]] = [(LayerNormOp(to.number(self.eps, f"{name}.eps")), "")]
        if self.scale:
            stages.append((Multiply(self.offset), "scale"))
        if self.bias:
            stages.append((AddOp(), "bias"))
        value = inputs[0]
        for i, (op, slot) in enumerate(stages):
            stored = (to.store(f"{name}.{slot}", width),) if slot else ()
            at = name if i == len(stages) - 1 else f"{name}.{slot + 'd' if slot else 'normed'}"
            value = to.add(at, op, value, *stored)
        return value


@dataclass(frozen=True)
class Linear(Component):
    """W x, plus a bias if asked for. The parameters are `weight` and `weight_bias`."""

    input: Signal
    out: int | str | None = None
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "linear"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return to.width if self.out is None else to.size(self.out)

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in = to.shapes[inputs[0]]
        return to.linear(name, "weight", inputs[0], d_in, self.width(to, (d_in,)), self.bias)


@dataclass(frozen=True)
class Activation(Component):
    """An element-wise function."""

    input: Signal
    fn: str
    name: str = ""
    kind: ClassVar[str] = "activation"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, ActivationOp(self.fn), *inputs)


@dataclass(frozen=True)
class Softcap(Component):
    """cap tanh(x / cap)."""

    input: Signal
    cap: Number
    name: str = ""
    kind: ClassVar[str] = "softcap"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, SoftcapOp(to.number(self.cap, f"{name}.cap")), *inputs)


@dataclass(frozen=True)
class Gain(Component):
    """A learned element-wise scale (LayerScale)."""

    input: Signal
    offset: float = 0.0
    name: str = ""
    kind: ClassVar[str] = "gain"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        scale = to.store(f"{name}.scale", to.shapes[inputs[0]])
        return to.add(name, Multiply(self.offset), inputs[0], scale)


@dataclass(frozen=True)
class Bias(Component):
    """A learned shift."""

    input: Signal
    name: str = ""
    kind: ClassVar[str] = "bias"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, AddOp(), inputs[0], to.store(f"{name}.bias", to.shapes[inputs[0]]))


@dataclass(frozen=True)
class Softmax(Component):
    """exp(x) over the sum of exp(x), over the coordinates of one token."""

    input: Signal
    name: str = ""
    kind: ClassVar[str] = "softmax"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, SoftmaxOp(), *inputs)


@dataclass(frozen=True)
class Concat(Component):
    """Two or more signals, one after the other."""

    inputs: tuple[Signal, ...]
    name: str = ""
    kind: ClassVar[str] = "concat"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return sum(inputs, Size.of(0))

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, ConcatOp(), *inputs)


@dataclass(frozen=True)
class Slice(Component):
    """The coordinates from `start` up to `stop`, counted from 0."""

    input: Signal
    start: int | str
    stop: int | str
    name: str = ""
    kind: ClassVar[str] = "slice"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return to.size(self.stop) - to.size(self.start)

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, SliceOp(to.size(self.start), to.size(self.stop)), *inputs)
