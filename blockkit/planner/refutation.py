"""When the answer is no: contexts for which no values of the free parameters reproduce the block.

Two sets are bounded: what the free parameters can make of a node, from above, and what the context asks of it, from
below (`analysis.extent`). Where the second does not fit into the first, some context has no solution. Parameters
upstream of a mixing node count as able to do anything there: no law inverts a mixing node, but nothing shows that they
cannot help, so the answer is then unknown rather than no.
"""

from __future__ import annotations

from ..graph.graph import Graph, Node
from ..graph.ops import (
    Activation,
    Add,
    Concat,
    LayerNorm,
    MatMul,
    Multiply,
    RMSNorm,
    Scale,
    Slice,
    Softcap,
    Softmax,
)
from ..graph.reach import Reach, covers
from ..graph.sizes import Size
from .analysis.extent import NONE, Asked, Moved, visible
from .analysis.facts import Facts

TWO = Size.of(2)
FAINT = 1e-3  # a norm's eps up to here leaves its results at the edge of their ball


class Refutation:
    """The argument for a no, on one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.facts = graph, Facts(graph)

    def holds(self, tokens: int | None = None) -> bool:
        """Whether some context has no solution at all, whatever the free parameters do.

        Asked at the output, and at all that must then take its contextual value as well: what is read by operations
        that take different values to different values.
        """
        self.moved, self.asked = Moved(self.facts, tokens or 1), Asked(self.facts)
        pending, seen = [self.graph.output], {self.graph.output}
        while pending:
            name = pending.pop()
            if name not in self.graph.contextual or name in self.facts.zero:
                continue
            if not covers(self.moved.of(name), self.asked.of(name)) or self._too_few(name, tokens or 1):
                return True
            node = self.graph.node[name]
            if self._unbalanced(node) or self._shows_fixed(node) or self._out_of_plane(node):
                return True
            inner = [arg for arg in self._settled(node) if arg not in seen]
            pending.extend(inner)
            seen.update(inner)
        return False

    def _settled(self, node: Node) -> list[str]:
        """The arguments that have their contextual values if the result has its own."""
        if isinstance(node.op, Concat):
            return list(node.args)
        if isinstance(node.op, Slice):
            return [arg for arg, hidden in visible(self.graph, node) if hidden == 0]
        injective = node.op.injective
        if isinstance(node.op, MatMul):
            rows, columns = self.graph.parameter[node.args[1]].shape
            injective = columns.at_most(rows) is True
        depends = [a for a in node.args if a in self.graph.contextual]
        held = all(a in depends or self.moved.of(a) is Reach.POINT for a in node.args)
        return depends if injective and len(depends) == 1 and held else []

    def _shows_fixed(self, node: Node) -> bool:
        """Whether a slice shows some of a concatenated value that the context moves, and the parameters do not."""
        if not isinstance(node.op, Slice):
            return False
        parts = (p for p in visible(self.graph, node) if self.moved.of(p[0]) is Reach.POINT)
        return any(self.asked.beside(arg, hidden) != 0 for arg, hidden in parts)

    def _too_few(self, name: str, tokens: int) -> bool:
        """Whether the context moves more dimensions than the free parameters: a smooth map cannot cover them."""
        asked = self.asked.dimension[name] * Size.of(tokens)
        return asked.at_most(self.moved.dimension[name]) is False

    def _unbalanced(self, node: Node) -> bool:
        """Whether a sum's only moving term is limited while the context shifts the others.

        The moving term would have to take its contextual value plus what the others miss. That leads outside if
        the others move without bound and the term has a bound on some side; or if the context can bring the term to
        the edge of what it can be.
        """
        moving, shifted = self._sides(node)
        if not isinstance(node.op, Add) or len(moving) != 1 or not shifted:
            return False
        limit = self.moved.of(moving[0])
        if (limit.bounded or limit.one_sided) and any(not self.asked.of(s).bounded for s in shifted):
            return True
        return self._at_the_edge(moving[0])

    def _sides(self, node: Node) -> tuple[list[str], list[str]]:
        """The terms (factors, parts) that the parameters move, and those that the context alone moves."""
        form = self.facts.forms.found[node.name] if isinstance(node.op, Add) else dict.fromkeys(node.args, 1.0)
        terms = [s for s, times in (form or {}).items() if times and s not in self.facts.zero]
        moving = [s for s in terms if self.moved.of(s) is not Reach.POINT]
        return moving, [s for s in terms if s not in moving and self.asked.dimension.get(s, NONE) != 0]

    def _out_of_plane(self, node: Node) -> bool:
        """Whether what moves stays in a plane that only this path leads through, while the context shifts the rest.

        The rest then leaves the plane: as a term, if it moves at all; as a factor, if it does more than scale; as the
        other parts of a concatenation under a matrix, which sends each part into a plane of its own.
        """
        read = self.graph.node.get(node.args[0])
        if isinstance(node.op, MatMul) and read is not None and isinstance(read.op, Concat):
            moving, shifted = self._sides(read)
            rows = self.graph.shapes[node.name][0]
            flat = all(rows.at_most(self.graph.shapes[m][0]) is False for m in moving)
            return flat and len(moving) == 1 == len(self.graph.uses[node.args[1]]) and shifted != []
        if not isinstance(node.op, Add | Multiply):
            return False
        moving, shifted = self._sides(node)
        if isinstance(node.op, Multiply):
            shifted = [s for s in shifted if TWO.at_most(self.asked.dimension[s])]
        return len(moving) == 1 and shifted != [] and self._in_a_plane(moving[0])

    def _in_a_plane(self, name: str) -> bool:
        """Whether the value stays in a fixed plane: it comes through a tall fixed matrix that is used nowhere else."""
        while (node := self.graph.node.get(name)) is not None:
            moving = [a for a in node.args if self.moved.of(a) is not Reach.POINT]
            if len(moving) != 1 or not isinstance(node.op, MatMul | Multiply | Scale | Add):
                return False
            if isinstance(node.op, Multiply) and not set(node.args) <= {moving[0], *self.graph.parameter}:
                return False
            if isinstance(node.op, MatMul):
                rows, columns = self.graph.parameter[node.args[1]].shape
                if moving[0] != node.args[0] or (rows.at_most(columns) is True and columns != rows):
                    return False
                if rows.at_most(columns) is False:
                    return len(self.graph.uses[node.args[1]]) == 1
            name = moving[0]
        return False

    def _at_the_edge(self, name: str) -> bool:
        """Whether contexts bring the value to the edge of its reach.

        A norm or a softmax always is there; an activation, where the context moves what it reads without limit. Fixed
        scales and tall fixed matrices behind them change nothing.
        """
        while (node := self.graph.node.get(name)) is not None:
            match node.op:
                case RMSNorm(eps=eps) | LayerNorm(eps=eps):
                    return eps <= FAINT
                case Softmax():
                    return True
                case Activation() | Softcap():
                    limited = self.moved.of(name).bounded or self.moved.of(name).one_sided
                    return limited and self.asked.of(node.args[0]) is Reach.ALL
            still = [a for a in node.args if self.moved.of(a) is Reach.POINT]
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
