"""How much of a target passes through known linear operations on the way down.

A target of n independent numbers passes a chain of known matrices, slices and concatenations if every value on the way
has room for n: outside a set of measure zero a product of matrices has the rank of its narrowest place. What has to be
known besides is which coordinates matter: all of them mix at a matrix, but a slice or a concatenation picks some.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graph.graph import Graph, Node
from ...graph.laws import Action
from ...graph.ops import Concat, MatMul, Slice
from ...graph.sizes import Size


@dataclass(frozen=True)
class Window:
    """The coordinates `start:stop` of a value that a target reaches, `needed` of which, freely chosen if `loose`, must
    be had."""

    start: Size
    stop: Size
    needed: Size
    loose: bool = False

    @staticmethod
    def whole(width: Size) -> Window:
        return Window(Size.of(0), width, width)

    @property
    def room(self) -> Size:
        return self.stop - self.start

    def below(self, graph: Graph, node: Node, position: int, action: Action) -> Window | str:
        """The window of the node's argument at `position`; or why the target does not pass."""
        match node.op:
            case MatMul() if position == 0:
                rows, columns = graph.shapes[node.args[1]]
                if self.needed.at_most(columns) is False:
                    return f"it has {rows} rows and only {columns} columns: its results fill a subspace"
                return Window(Size.of(0), columns, self.needed, True)
            case Slice(start=start):
                return Window(start + self.start, start + self.stop, self.needed, self.loose)
            case Concat():
                return self._part(graph, node, position)
        if action in (Action.SHIFT, Action.DIVIDE, Action.SCALE, Action.DIRECTION):
            return self
        return Window(self.start, self.stop, self.room)  # an inverse asks for definite numbers

    def _part(self, graph: Graph, node: Node, position: int) -> Window | str:
        first = Size.of(0)
        for arg in node.args[:position]:
            first = first + graph.shapes[arg][0]
        last = first + graph.shapes[node.args[position]][0]
        if first.at_most(self.start) and self.stop.at_most(last):
            return Window(self.start - first, self.stop - first, self.needed, self.loose)
        start = first if self.start.at_most(first) else self.start if first.at_most(self.start) else None
        stop = last if last.at_most(self.stop) else self.stop if self.stop.at_most(last) else None
        if not self.loose or start is None or stop is None or self.needed.at_most(stop - start) is not True:
            return "one part of a concatenation leaves the others as they are"
        return Window(start - first, stop - first, self.needed, True)
