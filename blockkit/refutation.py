"""When the answer is no: contexts for which no values of the free parameters reproduce the block.

Two sets are bounded by the same rules (`blockkit.reach`): what the free parameters can make of a node, and
what the context asks of it. Where the second is not covered by the first, some context has no solution.
Parameters upstream of a mixing node count as able to do anything there: no law inverts a mixing node,
but nothing shows that they cannot help, so the answer is then unknown rather than no.
"""

from __future__ import annotations

from functools import cached_property

from .graph import Graph, Node
from .ops import Add, LayerNorm, MatMul, Multiply, RMSNorm, Scale, Slice, Softmax
from .planner import MOST_TERMS
from .reach import Reach, covers
from .sizes import Size

FAINT = 1e-3  # a norm's eps up to here leaves its results at the edge of their ball


class Refutation:
    """The argument for a no, on one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def holds(self, tokens: int | None = None) -> bool:
        """Whether some context has no solution at all, whatever the free parameters do.

        The reach of the free parameters is bounded above; the context's own reach tells whether
        some context asks for more. Through an injective operation the question moves upstream.
        """
        free = self._extent(moved=True)
        asked = self._extent(moved=False)
        name = self.graph.output
        while True:
            if not covers(free[name], asked[name]):
                return True
            node = self.graph.node[name]
            if isinstance(node.op, Add) and self._unbalanced(node, free, asked):
                return True
            depends = [a for a in node.args if a in self.graph.contextual]
            held = all(a in depends or free.get(a, self._at_rest(a)) is Reach.POINT for a in node.args)
            if not (node.op.injective and len(depends) == 1 and held):
                everything = asked[self.graph.output] is Reach.ALL
                return tokens is not None and everything and self._too_few_numbers(tokens)
            name = depends[0]

    def _unbalanced(self, node: Node, free: dict[str, Reach], asked: dict[str, Reach]) -> bool:
        """Whether a sum's only moving term is pinned by a norm while the context shifts the others.

        The contextual value of the pinned term lies on the edge of what the term can be; whatever
        the others miss would have to be added to it, and half of all directions lead outside.
        """
        rest = {a: free.get(a, self._at_rest(a)) for a in node.args}
        moving = [a for a in node.args if rest[a] is not Reach.POINT]
        shifted = [a for a in node.args if a not in moving and asked.get(a, Reach.POINT) is not Reach.POINT]
        return len(moving) == 1 and bool(shifted) and self._pinned(moving[0], free)

    def _pinned(self, name: str, free: dict[str, Reach]) -> bool:
        """Whether the value is a norm or softmax, under fixed scales and tall fixed matrices only."""
        while (node := self.graph.node.get(name)) is not None:
            if isinstance(node.op, RMSNorm | LayerNorm | Softmax):
                return isinstance(node.op, Softmax) or node.op.eps <= FAINT
            still = [a for a in node.args if free.get(a, self._at_rest(a)) is Reach.POINT]
            if len(still) != len(node.args) - 1 or any(a in self.graph.contextual for a in still):
                return False
            if isinstance(node.op, MatMul):
                rows, columns = self.graph.parameter[node.args[1]].shape
                if columns.at_most(rows) is not True:
                    return False
            elif not isinstance(node.op, Multiply | Scale | Add):
                return False
            name = next(a for a in node.args if a not in still)
        return False

    def _extent(self, moved: bool) -> dict[str, Reach]:
        """The reach of every node: of the free parameters (`moved`), or of the context."""
        extent: dict[str, Reach] = {}
        for node in self.graph.nodes:
            inputs = [extent.get(a, self._at_rest(a) if moved else Reach.POINT) for a in node.args]
            if node.op.mixing:
                still = moved and all(r is Reach.POINT for r in inputs)
                extent[node.name] = Reach.POINT if still else Reach.ALL
            else:
                extent[node.name] = node.op.reach(inputs, self.graph.arguments(node))
                if not moved and self._may_cancel(node, extent):
                    extent[node.name] = Reach.POINT
        return extent

    def _may_cancel(self, node: Node, extent: dict[str, Reach]) -> bool:
        """Whether known linear maps may take out again what the context brought in."""
        if isinstance(node.op, Slice):
            return extent.get(node.args[0]) is Reach.PROPER
        if not isinstance(node.op, Add) or node.name not in self.graph.contextual:
            return False
        terms = self._combinations[node.name]
        return terms is None or 0 in terms.values()

    @cached_property
    def _combinations(self) -> dict[str, dict[str, float] | None]:
        """Each contextual value as a sum of multiples of others, through sums and known numbers.

        None where there are too many terms to keep.
        """
        found: dict[str, dict[str, float] | None] = {}
        for node in self.graph.nodes:
            if node.name not in self.graph.contextual:
                continue
            if not isinstance(node.op, Add | Scale):
                found[node.name] = {node.name: 1.0}
                continue
            factor = node.op.alpha if isinstance(node.op, Scale) else 1.0
            total: dict[str, float] | None = {}
            for arg in (a for a in node.args if a in self.graph.contextual):
                part = found[arg]
                if part is None or total is None or len(part) + len(total) > MOST_TERMS:
                    total = None
                    continue
                for source, times in part.items():
                    total[source] = total.get(source, 0.0) + factor * times
            found[node.name] = total
        return found

    def _at_rest(self, name: str) -> Reach:
        """The reach of a parameter or of the input."""
        parameter = self.graph.parameter.get(name)
        fixed = parameter is None or parameter.tied or parameter.frozen
        return Reach.POINT if fixed else Reach.ALL

    def _too_few_numbers(self, tokens: int) -> bool:
        """Fewer free numbers than equations: a smooth map cannot cover the targets of `tokens` tokens."""
        total = Size.of(0)
        for p in self.graph.parameters:
            if self._at_rest(p.name) is Reach.ALL:
                total = total + p.numbers
        asked = (self.graph.width * Size.of(tokens)).known
        return asked is not None and total.known is not None and total.known < asked
