"""The base of components that are one operation of a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...graph.ops.custom import Custom
from ...graph.ops.declaration import Declaration
from ...graph.sizes import Size
from .base import Component, Lowering, with_inputs


@dataclass(frozen=True)
class Operation(Declaration, Component):
    """One operation of a user's own: its forward, its parameters and its declared laws.

        @dataclass(frozen=True)
        class Sinh(bk.Operation):
            input: bk.Signal
            kind = "sinh"
            parameters = ("gain",)

            def compute(self, xp, u, gain):
                return gain * (xp.exp(u) - xp.exp(-u)) / 2

            @bk.solves("u", "u' = asinh(t / gain)", nonzero=["gain"])
            def for_u(self, t, u, gain):
                return np.arcsinh(t / gain)

    The first field is `input`, or `inputs` for several signals; further fields are settings. Parameters are vectors
    as wide as the first signal. For anything else, write a `Component` whose `lower` adds `operation.op()`.
    """

    name: str = field(default="", kw_only=True)

    def op(self, constants: Mapping[str, Any] | None = None) -> Custom:
        """The operation as a node's; a setting that is the name of a constant takes its value."""
        known = constants or {}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("input", "inputs", "name")}
        numbers = {k: known[v] for k, v in given.items() if isinstance(v, str) and v in known}
        own: Any = with_inputs(self, ("",))
        return Custom(replace(own, **numbers))

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        shapes = [(w,) for w in (*inputs, *(inputs[0] for _ in self.parameters))]
        return Size.of(self.shape(*shapes)[0])

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """One node, with a stored vector for each of `parameters`."""
        stored = [to.store(f"{name}.{p}", to.shapes[inputs[0]]) for p in self.parameters]
        return to.add(name, self.op(to.constants), *inputs, *stored)
