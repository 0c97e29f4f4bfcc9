"""Values as sums of multiples of others: what cancels, and what is always zero."""

from __future__ import annotations

from functools import cached_property

from ...graph.graph import Graph, Node
from ...graph.ops import Activation, Add, Concat, LayerNorm, MatMul, Multiply, RMSNorm, Scale, Slice, Softcap
from ...graph.ops.routing import Repeat

MOST_TERMS = 64  # longer sums are not followed term by term
Form = dict[str, float]  # values, each with the number it is multiplied by


class Forms:
    """Every node of a graph as a sum of multiples of others, through sums and known numbers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @cached_property
    def found(self) -> dict[str, Form | None]:
        """By node; None where there are too many terms to keep. A number may be zero: then the terms cancel."""
        forms: dict[str, Form | None] = {}
        for node in self.graph.nodes:
            if not isinstance(node.op, Add | Scale):
                forms[node.name] = {node.name: 1.0}
                continue
            factor = node.op.alpha if isinstance(node.op, Scale) else 1.0
            total: Form | None = {}
            for arg in node.args:
                part = forms.get(arg, {arg: 1.0})
                if part is None or total is None or len(part) + len(total) > MOST_TERMS:
                    total = None
                    continue
                for source, times in part.items():
                    total[source] = total.get(source, 0.0) + factor * times
            forms[node.name] = total
        return forms

    def reads(self, node: Node) -> tuple[str, ...]:
        """What a node's value really depends on: its arguments, without the terms of a sum that cancel."""
        form = self.found[node.name]
        if form is None or 0.0 not in form.values():
            return node.args
        return tuple(source for source, times in form.items() if times)

    @cached_property
    def zero(self) -> frozenset[str]:
        """The nodes that are zero whatever the context and the parameters are."""
        zero: set[str] = set()
        for node in self.graph.nodes:
            form = self.found[node.name]
            left = [s for s, times in form.items() if times and s not in zero] if form is not None else [node.name]
            if not left or self._keeps_zero(node, zero):
                zero.add(node.name)
        return frozenset(zero)

    def _keeps_zero(self, node: Node, zero: set[str]) -> bool:
        read = [a in zero for a in node.args]
        match node.op:
            case Multiply(offset=offset):
                return read[0] or (read[1] and not offset)
            case MatMul() | Slice() | Softcap() | Repeat():
                return read[0]
            case Concat():
                return all(read)
            case Activation(fn=fn):
                return read[0] and fn != "sigmoid"
            case RMSNorm(eps=eps):
                return read[0] and eps > 0
            case LayerNorm(eps=eps):
                return eps > 0 and (read[0] or self.graph.shapes[node.name][0].known == 1)
        return False
