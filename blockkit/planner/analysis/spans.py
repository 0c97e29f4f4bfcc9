"""How many dimensions the values of a node can span over all tokens: an upper bound that generic numbers meet.

A matrix that reads a bottleneck serves no more tokens than the bottleneck is wide. Outside a set of measure zero, what
linear operations leave of independent sources is what flows from them to the node if every value on the way lets
through as many dimensions as it has: the least cut (`.flow`). What is not linear is a source of its own, but
for functions of one number: those take few values, or have few straight pieces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ...graph.graph import Graph, Node
from ...graph.ops import (
    Activation,
    Add,
    Concat,
    LayerNorm,
    MatMul,
    Multiply,
    Op,
    RMSNorm,
    Scale,
    Slice,
    Softcap,
    Softmax,
)
from ...graph.ops.routing import Clamp, Repeat, TopK
from ...graph.sizes import Capacity, Size
from .combinations import MOST_TERMS, Forms
from .least_cut import least_cut

CONSTANT = ""  # the source of all that is the same for every token
FAINT = 1e-3  # a norm's eps up to here leaves only the sign of a single number
ONE = Capacity.of(1)
KINKED = ("relu", "leaky_relu")  # two straight halves


@dataclass(frozen=True)
class Span:
    """What one value spans.

    Attributes:
        bound: how many dimensions.
        reads: the values of which it is a linear image; none for a source.
        line: where it is one number times a fixed vector: the value that holds the number.
        signs: where it hangs on nothing but the signs of numbers: the constant and the signs that it is a sum of.
        shifted: whether a constant is part of it.
    """

    bound: Capacity
    reads: tuple[str, ...] = ()
    line: str | None = None
    signs: frozenset[str] | None = None
    shifted: bool = False


class Spans:
    """The spans of one graph, found in topological order."""

    def __init__(self, forms: Forms, narrow: Mapping[str, Capacity]) -> None:
        """`narrow` bounds the nodes of which few coordinates are ever not zero."""
        self.graph: Graph = forms.graph
        width = Capacity.of(self.graph.width)
        self.of = {self.graph.input: _source(self.graph.input, width), CONSTANT: _sign(CONSTANT)}
        self.forms, self.edges = forms, _edges(self.graph)
        self.first: dict[tuple[object, ...], str] = {}  # of the values that are the same, the first
        self.same: dict[str, str] = {}
        for node in self.graph.nodes:
            name, width = node.name, Capacity.of(self.graph.shapes[node.name][0]) & narrow.get(node.name, Capacity())
            reads = tuple(dict.fromkeys(CONSTANT if a in self.graph.parameter else a for a in forms.reads(node)))
            if name in forms.zero:
                self.of[name] = Span(Capacity.of(0), signs=frozenset())
            elif node.op.mixing:
                self.of[name] = _source(name, width)
            elif (first := self._alike(name, node.op, node.args)) != name:
                self.of[name] = self._image(name, width, (first,))
            elif self._linear(node):
                if isinstance(node.op, Slice):
                    reads = tuple(self._pieces(reads[0], node.op.start, node.op.stop))
                elif isinstance(node.op, Add):
                    reads = self._terms(node) or reads
                else:
                    reads = tuple(r for r in reads if r != CONSTANT)
                self.of[name] = self._image(name, width, reads)
            else:
                self.of[name] = self._function(node, width, reads)

    def __getitem__(self, name: str) -> Capacity:
        return self.of[name].bound

    def together(self, names: Iterable[str]) -> Capacity:
        """The bound of several values side by side."""
        return self._total(self._cut(tuple(dict.fromkeys(names))))

    def _linear(self, node: Node) -> bool:
        """Whether the result is the same linear map of the signals for every token (parameters are)."""
        match node.op:
            case Add() | Scale() | MatMul() | Concat() | Slice() | Repeat():
                return True
            case Activation(fn=fn):
                return fn == "identity"
            case Multiply(offset=offset):
                stored = [a in self.graph.parameter for a in node.args]
                return stored[1] or (stored[0] and not offset)
        return False

    def _image(self, name: str, width: Capacity, reads: tuple[str, ...]) -> Span:
        """A linear image: as much as flows to it, and no more than it is wide."""
        line = None
        if len(reads) == 1:
            bound, line = width & self.of[reads[0]].bound, self.of[reads[0]].line
        elif any(_covers(self.of[r].bound, width) for r in reads):
            bound = width
        else:
            cut = self._cut(reads)
            bound = width & self._total(cut) & self._total(reads)
            line = (self.of[cut[0]].line or cut[0]) if len(cut) == 1 else None
        signs = self._signs(reads)
        shifted = any(self.of[r].shifted for r in reads) and (bound != ONE or signs == frozenset({CONSTANT}))
        return Span(bound, reads, (line or name) if bound == ONE else None, signs, shifted)

    def _signs(self, reads: Iterable[str]) -> frozenset[str] | None:
        union: frozenset[str] = frozenset()
        for read in reads:
            signs = self.of[read].signs
            if signs is None:
                return None
            union |= signs
        return union

    def _alike(self, name: str, op: Op, args: tuple[str, ...], part: str = "") -> str:
        """The first value that was made in the same way: by the same operation, of the same arguments."""
        if isinstance(op, MatMul):
            args = (self._root(args[0], (Scale,)), args[1])
        same = tuple(self.same.get(a, a) for a in args)
        if isinstance(op, Activation) and op.fn == "identity":
            self.same[name] = same[0]
        else:
            self.same[name] = self.first.setdefault((op, part, *same), name)
        return self.same[name]

    def _pieces(self, arg: str, start: Size, stop: Size) -> Iterator[str]:
        """The pieces of `arg` that a slice reads, pieces being what lies between the edges of all its slices."""
        node, edges = self.graph.node.get(arg), self.edges.get(arg)
        if not edges or start.known is None or stop.known is None:
            yield arg
        elif node is not None and isinstance(node.op, Concat):
            first = 0
            for part in node.args:
                last = first + (self.graph.shapes[part][0].known or 0)
                low, high = max(start.known, first), min(stop.known, last)
                if low < high:
                    yield from self._pieces(part, Size.of(low - first), Size.of(high - first))
                first = last
        else:
            for a, b in pairwise(e for e in edges if start.known <= e <= stop.known):
                whole, piece, bound = self.of[arg], f"{arg}[{a}:{b}]", Capacity.of(b - a)
                if node is not None and isinstance(node.op, RMSNorm):  # which only scales what it reads
                    bound = bound & self.together(self._pieces(node.args[0], Size.of(a), Size.of(b)))
                self.of[piece] = Span(bound & whole.bound, (arg,), whole.line, whole.signs, whole.shifted)
                yield piece

    def _terms(self, node: Node) -> tuple[str, ...]:
        """What a sum reads if terms of it share a plane, as W a + W b = W (a + b) does; else nothing."""
        pieces = self._summands(node)
        if 0.0 in pieces.values():
            return tuple(dict.fromkeys(s for s, times in pieces.items() if times))
        planes: defaultdict[str, list[str]] = defaultdict(list)
        for term in (s for s, times in (self.forms.found[node.name] or {}).items() if times):
            planes[self._plane(term)].append(term)
        if all(len(terms) == 1 for terms in planes.values()):
            return ()
        for plane, terms in planes.items():
            if len(terms) > 1:
                inner = tuple(dict.fromkeys(r for t in terms for r in self.of[t].reads or (t,)))
                bound = self._room(plane) & self._total(self._cut(inner))
                self.of[" + ".join(terms)] = Span(bound, inner)
        names = (" + ".join(terms) for terms in planes.values())
        return tuple(dict.fromkeys(CONSTANT if n in self.graph.parameter else n for n in names))

    def _summands(self, node: Node) -> dict[str, float]:
        """A sum as pieces of sources, slices of sums being sums of slices: those that cancel have a zero."""
        total: defaultdict[str, float] = defaultdict(float)
        for term, times in (self.forms.found[node.name] or {}).items():
            cut = self.graph.node.get(term)
            if cut is None or not isinstance(cut.op, Slice):
                total[CONSTANT if term in self.graph.parameter else term] += abs(times)
                continue
            for source, factor in (self.forms.found.get(cut.args[0]) or {cut.args[0]: 1.0}).items():
                if source in self.graph.parameter:
                    total[CONSTANT] += abs(times)
                    continue
                for piece in self._pieces(source, cut.op.start, cut.op.stop):
                    total[piece] += times * factor
        return total

    def _plane(self, name: str) -> str:
        """What says in which plane a value lies: the matrix it comes from. A norm only scales."""
        node = self.graph.node.get(name)
        while node is not None and isinstance(node.op, RMSNorm):
            name = node.args[0]
            node = self.graph.node.get(name)
        return node.args[1] if node is not None and isinstance(node.op, MatMul) else name

    def _room(self, plane: str) -> Capacity:
        if plane in self.graph.parameter:
            return Capacity.of(*self.graph.shapes[plane])
        return self.of[plane].bound

    def _function(self, node: Node, width: Capacity, reads: tuple[str, ...]) -> Span:
        """A value that is no linear image of what it reads."""
        name, first = node.name, self.of[reads[0]]
        signs = self._signs(reads)
        if signs is not None and len(signs - {CONSTANT}) <= 1:
            return self._image(name, width, tuple(sorted(self._of_signs(node, signs))))
        match node.op:
            case RMSNorm(eps=eps) | LayerNorm(eps=eps):
                bound = first.bound & (_less(width) if isinstance(node.op, LayerNorm) else width)
                if bound == ONE and eps <= FAINT:
                    sign = f"sign of {first.line or name}"
                    self.of[sign] = _sign(sign)
                    return self._image(name, width, (sign,))
                return _source(name, bound)
            case Activation() | Softcap() | Clamp():
                return self._image(name, width, tuple(dict.fromkeys(self._applied(node))))
            case Softmax() | TopK(normalise=True):
                moving = f"{name} but for its sum"
                self.of[moving] = Span(_less(width), signs=frozenset() if width == ONE else None)
                return self._image(name, width, (moving, CONSTANT))
            case Multiply(offset=offset):
                if not offset:
                    width = width & self._products(*self._factors(node), 1)
                return self._image(name, width, tuple(dict.fromkeys(self._product(node))))
        return _source(name, width)

    def _applied(self, node: Node) -> Iterator[str]:
        """What a function of single coordinates is made of: itself, of every part of what it reads.

        A function of two straight halves is a multiple of what it reads as long as that keeps its sign.
        """
        read = self.graph.node.get(node.args[0])
        for part in read.args if read is not None and isinstance(read.op, Concat) else node.args:
            span, own = self.of[part], self._alike(f"{node.name} of {part}", node.op, (part,), "part")
            if span.bound == Capacity.of(0) and getattr(node.op, "fn", "sigmoid") != "sigmoid":
                continue
            width = Capacity.of(self.graph.shapes[part][0])
            if span.signs is not None and len(span.signs - {CONSTANT}) <= 1:
                self.of[own] = self._image(own, width, tuple(sorted(self._of_signs(node, span.signs))))
            elif isinstance(node.op, Activation) and node.op.fn in KINKED and (span.line or self._positive(part)):
                self.of[own] = self._image(own, width, (part,))
            else:
                self.of[own] = _source(own, width)
            yield own

    def _of_signs(self, node: Node, signs: frozenset[str]) -> frozenset[str]:
        """The signs of which a function of signs is a sum: the constant (even), a sign (odd), or both."""
        sign = signs - {CONSTANT}
        match node.op:
            case RMSNorm() | LayerNorm() | Softcap() | Activation(fn="tanh") if not (sign and CONSTANT in signs):
                return signs
            case Multiply(offset=0.0):
                parts = [self.of[CONSTANT if a in self.graph.parameter else a].signs or frozenset() for a in node.args]
                odd = any((a in sign) != (b in sign) for a in parts[0] for b in parts[1])
                even = any((a in sign) == (b in sign) for a in parts[0] for b in parts[1])
                return (sign if odd else frozenset()) | ({CONSTANT} if even else frozenset())
        return sign | {CONSTANT}

    def _positive(self, name: str) -> bool:
        """Whether a value is never negative."""
        node = self.graph.node.get(name)
        if node is None or not isinstance(node.op, Softmax | TopK | Activation):
            return False
        return not isinstance(node.op, Activation) or node.op.fn in ("relu", "sigmoid")

    def _product(self, node: Node) -> Iterator[str]:
        """What a product is made of: the products of what moves, and each factor where the other is shifted."""
        a, b = self._factors(node)
        own = f"{node.name} of what moves"
        self.of[own] = _source(own, self._products(a, b, 0))
        yield own
        if self.of[a].shifted:
            yield b
        if self.of[b].shifted or (isinstance(node.op, Multiply) and node.op.offset):
            yield a

    def _factors(self, node: Node) -> tuple[str, str]:
        first, second = (CONSTANT if arg in self.graph.parameter else arg for arg in node.args)
        return first, second

    def _products(self, a: str, b: str, constant: int) -> Capacity:
        """How many products there are of two sets of numbers; of numbers that both factors share, each but once.

        With `constant` 0, only those of what moves.
        """
        left, right = (self._total(self._cut((name,), constant)) for name in (a, b))
        bound = Capacity.of(*(s * t for s in left.sizes for t in right.sizes))
        if any(s.known is None for s in bound.sizes):
            return bound
        roots = [self._root(n, (RMSNorm, Scale, Multiply, MatMul)) for n in (a, b)]
        shared = [self._total(self._cut(tuple(dict.fromkeys(roots)), constant)).estimate()]
        planes = [self._plane(self._root(n, (RMSNorm, Scale, Multiply))) for n in (a, b)]
        if planes[0] == planes[1]:
            shared.append(self._room(planes[0]).estimate())
        bound = bound & Capacity.of(*(int(n * (n + 1)) // 2 for n in shared))
        for name, other in ((a, right), (b, left)):
            read = self.graph.node.get(name)
            if read is not None and isinstance(read.op, Concat):  # part by part
                parts = [(self.graph.shapes[p][0].estimate(), self.of[p].bound.estimate()) for p in read.args]
                bound = bound & Capacity.of(sum(int(min(w, r * other.estimate())) for w, r in parts))
        return bound

    def _root(self, name: str, passed: tuple[type[Op], ...]) -> str:
        """The value that one is made from by operations of the kinds `passed`, of one signal each."""
        while (node := self.graph.node.get(name)) is not None:
            signals = self._signals(node)
            if len(signals) != 1 or not isinstance(node.op, passed):
                return name
            name = signals[0]
        return name

    def _signals(self, node: Node) -> list[str]:
        return [a for a in node.args if a not in self.graph.parameter]

    def _cut(self, reads: tuple[str, ...], constant: int = 1) -> list[str]:
        def room(name: str) -> float:
            return constant if name == CONSTANT else self.of[name].bound.estimate()

        return [n for n in least_cut(reads, lambda n: self.of[n].reads, room) if n != CONSTANT or constant]

    def _total(self, names: Iterable[str]) -> Capacity:
        total = [Size.of(0)]
        for name in names:
            total = [t + s for t in total for s in self.of[name].bound.sizes][:MOST_TERMS]
        return Capacity.of(*total)


def _source(name: str, bound: Capacity) -> Span:
    return Span(bound, line=name if bound == ONE else None)


def _sign(name: str) -> Span:
    return Span(ONE, line=name, signs=frozenset({name}), shifted=name == CONSTANT)


def _less(width: Capacity) -> Capacity:
    """One dimension less."""
    return Capacity.of(*(s - Size.of(1) for s in width.sizes))


def _covers(bound: Capacity, width: Capacity) -> bool:
    """Whether the bound is surely no less than the width."""
    return all(any(w.at_most(b) for w in width.sizes) for b in bound.sizes)


def _edges(graph: Graph) -> dict[str, list[int]]:
    """By sliced value, where its slices start and stop, passed on to the parts of a concatenation; none if unknown."""
    found: defaultdict[str, set[int | None]] = defaultdict(set)
    for node in reversed(graph.nodes):
        if isinstance(node.op, Slice):
            found[node.args[0]] |= {node.op.start.known, node.op.stop.known}
        if isinstance(node.op, Add | Scale | RMSNorm) and found.get(node.name):
            for arg in node.args:
                found[arg] |= found[node.name]
        if isinstance(node.op, Concat) and found.get(node.name):
            first = Size.of(0)
            for part in node.args:
                last, width = first + graph.shapes[part][0], graph.shapes[part][0].known
                inside = (None if e is None or first.known is None else e - first.known for e in found[node.name])
                found[part] |= {0, width, *(e for e in inside if e is None or width is None or 0 < e < width)}
                first = last
    return {n: sorted(e for e in edges if e is not None) for n, edges in found.items() if None not in edges}


def active_experts(graph: Graph) -> dict[str, Capacity]:
    """Values of which only the chosen experts' coordinates are not zero: how many those are.

    However the tokens are routed, that many tokens have independent values; more may share their experts.
    """
    found: dict[str, Size] = {}
    for node in graph.nodes:
        if isinstance(node.op, TopK):
            found[node.name] = node.op.k
        elif isinstance(node.op, Repeat) and node.args[0] in found:
            found[node.name] = found[node.args[0]] * node.op.times
        elif isinstance(node.op, Multiply | Scale | Activation) and getattr(node.op, "fn", "") != "sigmoid":
            found.update((node.name, found[a]) for a in node.args if a in found)
    return {name: Capacity.of(size) for name, size in found.items()}
