"""Components made of components, as a spec defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...graph.sizes import Size
from .base import Component, Lowering, Signal, inputs_of
from .lowering import in_order, settle


@dataclass(frozen=True)
class Composite(Component):
    """One use of a composite.

    Attributes:
        inputs: what it reads where it is used.
        definition: the composite's name.
        settings: those given at this use.
        nodes: its components, with the settings put in.
        reads: its own names for what it reads.
        output: the component that holds its result.
    """

    inputs: tuple[Signal, ...]
    definition: str
    settings: Mapping[str, Any]
    nodes: Mapping[str, Component]
    reads: tuple[str, ...]
    output: str
    name: str = ""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.definition

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        known = dict(zip(self.reads, inputs, strict=True))
        for name in in_order(self.nodes, self.reads):
            component = self.nodes[name]
            known[name] = component.width(to, tuple(known[i] for i in inputs_of(component)))
        return known[self.output]

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Its components, named after it: `mlp.inner`."""
        values = dict(zip(self.reads, inputs, strict=True))
        settle(to, self.nodes, values, name)
        return values[self.output]
