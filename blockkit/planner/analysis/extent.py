"""How far values can be moved: by the free parameters (bounds from above), and by the context (bounds from below).

Two measures of each: the kind of set (`blockkit.graph.reach`) and its dimension. A known matrix is taken to be
generic: it keeps as many dimensions as fit. Parameters upstream of a mixing node count as able to do anything there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...graph.graph import Graph, Node
from ...graph.ops import (
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
from ...graph.ops.routing import TopK
from ...graph.reach import Reach, scaled, sum_of
from ...graph.sizes import Size
from .combinations import MOST_TERMS, Form
from .facts import Facts

NONE, SOME = Size.of(0), Size.of("some")  # some: a symbol, at least one


def least(a: Size, b: Size) -> Size:
    """The smaller of two upper bounds; where that hangs on symbols, the first."""
    return b if b.at_most(a) else a


class Moved:
    """What the free parameters can make of every node, for `tokens` tokens at once."""

    def __init__(self, facts: Facts, tokens: int) -> None:
        self.facts, self.graph, self.tokens = facts, facts.graph, Size.of(tokens)
        self.reach: dict[str, Reach] = {}
        self.dimension: dict[str, Size] = {}
        movers: dict[str, frozenset[str]] = {}
        for node in self.graph.nodes:
            if node.name in facts.zero:
                self.reach[node.name], self.dimension[node.name], movers[node.name] = Reach.POINT, NONE, frozenset()
                continue
            self.reach[node.name] = self._reach(node)
            by = frozenset[str]().union(*(movers.get(a, self._self(a)) for a in node.args))
            movers[node.name] = by if len(by) <= MOST_TERMS else frozenset({"*"})
            self.dimension[node.name] = self._dimension(node, movers[node.name])

    def free(self, name: str) -> bool:
        """Whether it is a parameter that nobody holds (whether or not a law solves for it)."""
        parameter = self.graph.parameter.get(name)
        return parameter is not None and not (parameter.tied or parameter.frozen)

    def of(self, name: str) -> Reach:
        """The reach of a node, a parameter or the input."""
        return self.reach.get(name, Reach.ALL if self.free(name) else Reach.POINT)

    def _self(self, name: str) -> frozenset[str]:
        return frozenset({name}) if self.free(name) else frozenset()

    def _reach(self, node: Node) -> Reach:
        inputs = [self.of(a) for a in node.args]
        if node.op.mixing:
            return Reach.POINT if all(r is Reach.POINT for r in inputs) else Reach.ALL
        form = self.facts.forms.found[node.name]
        if isinstance(node.op, Add) and form is not None:
            return _sum(form, self.of)
        return node.op.reach(inputs, self.graph.arguments(node))

    def _dimension(self, node: Node, movers: frozenset[str]) -> Size:
        if not movers:
            return NONE
        width = self.graph.shapes[node.name][0]
        flat = isinstance(node.op, LayerNorm | Softmax) or (isinstance(node.op, RMSNorm) and node.op.eps == 0)
        bound = (width - Size.of(1) if flat else width) * self.tokens
        if node.op.mixing or "*" in movers:
            return bound
        total, stored = NONE, NONE
        for arg in dict.fromkeys(node.args):
            total = total + (self.dimension.get(arg) or (self._numbers(arg) if self.free(arg) else NONE))
        for name in movers:
            stored = stored + self._numbers(name)
        if any(a in self.graph.before_mixing for a in movers):
            stored = total
        return least(least(bound, total), stored)

    def _numbers(self, name: str) -> Size:
        return self.graph.parameter[name].numbers


class Asked:
    """What the context can make of every node, for one token: no more is claimed than surely holds."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph = facts, facts.graph
        self.reach: dict[str, Reach] = {}
        self.dimension: dict[str, Size] = {}
        for node in self.graph.nodes:
            still = node.name in facts.zero or node.name not in self.graph.contextual
            self.dimension[node.name] = NONE if still else self._dimension(node)
            still = still or self.dimension[node.name] == 0
            self.reach[node.name] = Reach.POINT if still else self._reach(node)

    def of(self, name: str) -> Reach:
        return self.reach.get(name, Reach.POINT)

    def _reach(self, node: Node) -> Reach:
        if node.op.mixing:
            return Reach.ALL
        form = self.facts.forms.found[node.name]
        if isinstance(node.op, Add):
            found = _sum(form, self.of) if form is not None else Reach.POINT
        else:
            found = node.op.fills([self.of(a) for a in node.args], self.graph.arguments(node))
        full = self.graph.shapes[node.name][0].at_most(self.dimension[node.name])
        return Reach.PROPER if found is Reach.ALL and not full else found

    def _dimension(self, node: Node) -> Size:
        """A lower bound on how many dimensions the context moves."""
        width = self.graph.shapes[node.name][0]
        if node.op.mixing:
            return width
        parts = [self.dimension.get(a, NONE) for a in node.args]
        match node.op:
            case Add():
                form = self.facts.forms.found[node.name]
                moving = [s for s, times in (form or {}).items() if times]
                return _most([self.dimension.get(s, NONE) for s in moving])
            case MatMul():
                return _fits(parts[0], width)
            case Slice():
                return self._sliced(node, width)
            case LayerNorm():
                return _minus(parts[0], 2)
            case RMSNorm(eps=eps):
                return parts[0] if eps > 0 else _minus(parts[0], 1)
            case Softmax():
                return _minus(parts[0], 1)
            case Concat() | Multiply() | Scale() | Softcap() | Activation():
                return _most(parts)
            case TopK():
                return NONE
        return _most(parts) if node.op.injective else NONE

    def _sliced(self, node: Node, width: Size) -> Size:
        """Coordinates left out may have held what moved; of a matrix product, any of them hold as much."""
        parts = [self.beside(arg, hidden) for arg, hidden in visible(self.graph, node)]
        return _fits(_most(parts), width)

    def beside(self, name: str, hidden: Size) -> Size:
        """A lower bound on how many dimensions the context moves of a value, `hidden` coordinates of it left out."""
        dimension, node = self.dimension.get(name, NONE), self.graph.node.get(name)
        if node is not None and isinstance(node.op, MatMul):
            return _fits(dimension, self.graph.shapes[name][0] - hidden)
        return _lost(dimension, hidden)


def visible(graph: Graph, node: Node) -> Iterator[tuple[str, Size]]:
    """What a slice surely shows: its argument, or the parts of that concatenation, each with how much is hidden."""
    read, op = graph.node.get(node.args[0]), node.op
    if not isinstance(op, Slice):
        return
    first = NONE
    for arg in read.args if read is not None and isinstance(read.op, Concat) else node.args:
        last = first + graph.shapes[arg][0]
        start = first if op.start.at_most(first) else op.start
        stop = last if last.at_most(op.stop) else op.stop
        if start.at_most(stop) and first.at_most(start) and stop.at_most(last) and start != stop:
            yield arg, last - first - (stop - start)
        first = last


def _sum(form: Form, reach_of: Callable[[str], Reach]) -> Reach:
    total = Reach.POINT
    for source, times in form.items():
        if times:
            total = sum_of(total, scaled(reach_of(source), times))
    return total


def _most(sizes: list[Size]) -> Size:
    """The largest of several lower bounds; where that hangs on symbols, the first."""
    best = NONE
    for size in sizes:
        best = size if best.at_most(size) else best
    return best


def _fits(dimension: Size, width: Size) -> Size:
    """min(dimension, width); where that hangs on symbols, some, if there is anything at all."""
    if dimension.at_most(width) or width.at_most(dimension):
        return dimension if dimension.at_most(width) else width
    return SOME if Size.of(1).at_most(dimension) else NONE


def _minus(dimension: Size, count: int) -> Size:
    """A few dimensions less; a width that is still a symbol is taken to be more than those few."""
    return SOME if dimension.known is None else _lost(dimension, Size.of(count))


def _lost(dimension: Size, count: Size) -> Size:
    return dimension - count if count.at_most(dimension) else NONE
