"""A mixture of experts: a router, stacked experts, and shared experts that every token goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import BadInput
from ...graph.ops import Activation as ActivationOp
from ...graph.ops import Add as AddOp
from ...graph.ops import MatMul, Multiply
from ...graph.ops.routing import Clamp, Repeat, Scores, TopK
from ...graph.sizes import Size
from .base import Component, Lowering, Number, Signal
from .mlp import GatedMLP


@dataclass(frozen=True)
class Experts(Component):
    """sum_e s_e down_e(activation(gate_e x) * up_e x) over the chosen experts e, plus shared experts.

    Experts are stacked: `router [experts, d_model]`, `gate_proj` and `up_proj [experts*hidden, d_model]`,
    `down_proj [d_model, experts*hidden]`, with biases `gate_proj_bias`, `up_proj_bias [experts*hidden]` and
    `down_proj_bias [d_model, experts]`.

    Args:
        experts, top_k, hidden: how many there are, how many a token is sent to, and the width of each.
        gated: false leaves out `gate_proj`: down_e(activation(up_e x)).
        scores: softmax over all experts, or a sigmoid of each.
        normalise: the chosen scores are divided by their sum.
        eps: added to that sum.
        scale: the weights are multiplied by it.
        weigh: `output`, as above, or `input`: s_e multiplies what expert e reads (Llama 4).
        router_bias: a bias on the router's logits.
        correction: a stored vector added to the scores for the choice only.
        groups, top_groups: the choice is made among the experts of the best groups.
        bias: biases on all three projections.
        limit: the gate is clamped from above, the up projection on both sides.
        up_offset: added to the up projection.
        shared: hidden width of shared experts, a gated MLP `NAME.shared`; None for none.
        shared_gate: its result is multiplied by the sigmoid of one learned number a token (Qwen 2 MoE).
    """

    input: Signal
    experts: int | str
    top_k: int | str
    hidden: int | str
    activation: str = "silu"
    gated: bool = True
    scores: Scores = "softmax"
    normalise: bool = True
    eps: Number = 0.0
    scale: Number = 1.0
    weigh: str = "output"
    router_bias: bool = False
    correction: bool = False
    groups: int | str = 1
    top_groups: int | str = 1
    bias: bool = False
    limit: Number | None = None
    up_offset: float = 0.0
    shared: int | str | None = None
    shared_gate: bool = False
    name: str = ""
    kind: ClassVar[str] = "experts"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Router, stacked projections with the weights multiplied in, shared experts."""
        if self.weigh not in ("input", "output"):
            raise BadInput(f"weigh must be input or output, got {self.weigh!r}")
        if self.weigh == "input" and self.bias:
            raise BadInput("weigh: input and biases do not go together")
        z, width = inputs[0], to.shapes[inputs[0]]
        count, hidden = to.size(self.experts), to.size(self.hidden)
        weights = self._router(to, name, z, width, count)
        repeated = to.add(f"{name}.weights_repeated", Repeat(hidden), weights)
        value = self._hidden(to, name, z, width, count * hidden, repeated)
        if self.weigh == "output":
            value = to.add(f"{name}.weighted", Multiply(), value, repeated)
        out = to.linear(name, "down_proj", value, count * hidden, width, False)
        if self.bias:
            biases = to.add(f"{name}.biases", MatMul(), weights, to.store(f"{name}.down_proj_bias", width, count))
            out = to.add(f"{name}.down_proj.biased", AddOp(), out, biases)
        if self.shared is None:
            return out
        return to.add(f"{name}.sum", AddOp(), out, self._shared(to, name, z, width))

    def _router(self, to: Lowering, name: str, z: str, width: Size, count: Size) -> str:
        logits = to.linear(name, "router", z, width, count, self.router_bias)
        op = TopK(to.size(self.top_k), self.scores, self.normalise, to.number(self.scale, f"{name}.scale"),
                  to.size(self.groups), to.size(self.top_groups),
                  to.number(self.eps, f"{name}.eps"))  # fmt: skip
        stored = (to.store(f"{name}.correction", count),) if self.correction else ()
        return to.add(f"{name}.weights", op, logits, *stored)

    def _hidden(self, to: Lowering, name: str, z: str, d_in: Size, total: Size, repeated: str) -> str:
        limit = None if self.limit is None else to.number(self.limit, f"{name}.limit")

        def projected(slot: str, low: float | None) -> str:
            value = to.linear(name, slot, z, d_in, total, self.bias)
            if self.weigh == "input":
                value = to.add(f"{name}.{slot}.weighted", Multiply(), value, repeated)
            return value if limit is None else to.add(f"{name}.{slot}.held", Clamp(low, limit), value)

        if not self.gated:
            return to.add(f"{name}.hidden", ActivationOp(self.activation), projected("up_proj", None))
        gate = to.add(f"{name}.gate", ActivationOp(self.activation), projected("gate_proj", None))
        up = projected("up_proj", None if limit is None else -limit)
        return to.add(f"{name}.hidden", Multiply(self.up_offset), gate, up)

    def _shared(self, to: Lowering, name: str, z: str, width: Size) -> str:
        mlp = GatedMLP("", self.shared or 0, self.activation).lower(to, f"{name}.shared", (z,))
        if not self.shared_gate:
            return mlp
        logit = to.linear(name, "shared_gate", z, width, Size.of(1), False)
        opened = to.add(f"{name}.shared_gate.open", ActivationOp("sigmoid"), logit)
        repeated = to.add(f"{name}.shared_gate.repeated", Repeat(width), opened)
        return to.add(f"{name}.shared.gated", Multiply(), mlp, repeated)
