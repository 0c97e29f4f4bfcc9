"""The MLPs of transformer blocks: plain and gated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...graph.ops import Activation as ActivationOp
from ...graph.ops import Multiply
from .base import Component, Lowering, Signal


@dataclass(frozen=True)
class MLP(Component):
    """down_proj(activation(up_proj x)), with biases if asked for."""

    input: Signal
    hidden: int | str
    activation: str = "gelu_tanh"
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "mlp"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in, hidden = to.shapes[inputs[0]], to.size(self.hidden)
        up = to.linear(name, "up_proj", inputs[0], d_in, hidden, self.bias)
        active = to.add(f"{name}.hidden", ActivationOp(self.activation), up)
        return to.linear(name, "down_proj", active, hidden, d_in, self.bias)


@dataclass(frozen=True)
class GatedMLP(Component):
    """down_proj(activation(gate_proj x) * up_proj x), with biases if asked for."""

    input: Signal
    hidden: int | str
    activation: str = "silu"
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "gated_mlp"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in, hidden = to.shapes[inputs[0]], to.size(self.hidden)
        gate = to.linear(name, "gate_proj", inputs[0], d_in, hidden, self.bias)
        up = to.linear(name, "up_proj", inputs[0], d_in, hidden, self.bias)
        active = to.add(f"{name}.gate", ActivationOp(self.activation), gate)
        product = to.add(f"{name}.hidden", Multiply(), active, up)
        return to.linear(name, "down_proj", product, hidden, d_in, self.bias)
