"""Input and output control of any component (Definitions 3 and 4 of arXiv 2511.17864), derived and never looked up.

A component is put into two small graphs, and the planner judges both:

    input control    the component reads what the context changes: restore its result by its own parameters;
    output control   the component reads fixed values, and its result is added to what the context changes: so that the
                     sum can be restored exactly if the component's result can be given any value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..design.architecture import Block
from ..design.components import Component, Linear
from ..display import short, tagged
from ..graph.graph import Graph, Node
from ..graph.laws import Condition
from ..graph.ops import Add, Mix, Shape, Slice
from ..graph.sizes import Capacity, Size
from .route import Route
from .verdict import Verdict, judge

READOUT = "readout"
INPUT_LEMMAS = "Lemmas 6 and 7"


@dataclass(frozen=True)
class Control:
    """Whether a component has one of the two abilities.

    Attributes:
        holds: True; False; None where it is conditional (there are routes) or unknown (there are none).
        capacity: the most tokens that one static value can serve.
        routes: every way; the first is the one that the paper takes, or else the outermost.
        source: the lemma behind the first route.
    """

    holds: bool | None
    capacity: Capacity
    routes: tuple[Route, ...]
    source: str

    @property
    def status(self) -> str:
        if self.holds is None:
            return "conditional" if self.routes else "unknown"
        return "holds" if self.holds else "no"

    @property
    def able(self) -> bool:
        """Whether it holds, at least outside open conditions."""
        return self.holds is True or bool(self.routes)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the first route."""
        return self.routes[0].parameters if self.routes else ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions of the first route."""
        return self.routes[0].conditions if self.routes else ()

    __repr__ = short

    def __str__(self) -> str:
        if not self.routes:
            return self.status
        via = " + ".join(self.parameters) or "nothing to do"
        hangs = f" if {'; '.join(map(str, self.conditions))}" if self.conditions else ""
        return f"{self.status}, via {via} (tokens: {self.routes[0].capacity}; {self.source}){hangs}"


@dataclass(frozen=True)
class Controls:
    """What a component can do; `mixing` if it looks at other tokens."""

    input_control: Control
    output_control: Control
    mixing: bool = False

    def __repr__(self) -> str:
        return tagged(self, f"input {self.input_control.status}, output {self.output_control.status}")

    def __str__(self) -> str:
        return f"input control:  {self.input_control}\noutput control: {self.output_control}"


def controls(subject: Component | Block | Graph, width: int | str = "d_model") -> Controls:
    """The input and output control of a component, of an expression of components, or of a whole block.

    Args:
        subject: `GatedMLP(RMSNorm(stream()), hidden=64)`, a `Block`, or a `Graph`.
        width: of the stream that a component reads.

    Raises:
        BadInput: the component does not fit the width.
    """
    if isinstance(subject, Graph):
        return controls_of(subject, subject.node)
    if isinstance(subject, Block):
        graph = subject.graph()
        return controls_of(graph, graph.node)
    graph = Block(Linear(subject, name=READOUT), width).graph()  # the component's own width may be another
    return controls_of(graph, [n for n in graph.node if not n.startswith(f"{READOUT}.")])


def controls_of(graph: Graph, names: Iterable[str]) -> Controls:
    """The controls of some nodes of a graph, taken as one component; its result is the last that others read."""
    inside = set(names)
    nodes = [n for n in graph.nodes if n.name in inside]
    read = list(dict.fromkeys(a for n in nodes for a in n.args if a not in inside and a not in graph.parameter))
    result = next(n.name for n in reversed(nodes) if n.name == graph.output or _read_outside(graph, n.name, inside))
    changed = _around(graph, nodes, read, result, steered=False)
    fixed = _around(graph, nodes, read, result, steered=True)
    return Controls(_restored(judge(changed)), _steered(judge(fixed)), any(n.op.mixing for n in nodes))


def _read_outside(graph: Graph, name: str, inside: set[str]) -> bool:
    return any(reader not in inside for reader, _ in graph.uses.get(name, ()))


def _restored(verdict: Verdict) -> Control:
    """Input control: the inner projection first, as in the paper."""
    inner = [r for r in reversed(verdict.routes) if _in_place(r)]
    routes = sorted(dict.fromkeys((*inner, *verdict.routes)), key=lambda r: r.conditional)
    source = routes[0].source if routes else ""
    return Control(
        verdict.patchable, verdict.capacity, tuple(routes), INPUT_LEMMAS if routes and _in_place(routes[0]) else source
    )


def _in_place(route: Route) -> bool:
    """Whether the route restores what some matrix gives, by that matrix."""
    return len(route.steps) == 1 and route.steps[0].is_matrix and len(route.steps[0].path) == 1


def _steered(verdict: Verdict) -> Control:
    routes = sorted(verdict.routes, key=lambda r: r.conditional)
    source = routes[0].source.partition(", through")[0] if routes else ""  # the added sum is no part of the component
    return Control(verdict.patchable, verdict.capacity, tuple(routes), source)


def _around(graph: Graph, nodes: list[Node], read: list[str], result: str, steered: bool) -> Graph:
    """The component between signals that the context changes (or fixed ones) and an output to be restored."""
    names, shapes, ends = _Names(graph), dict[str, Shape](), Size.of(0)
    stream, given = names.free("stream"), {}
    extra = []
    for signal in read:
        given[signal], start = names.free(f"{signal}_in"), ends
        width = graph.shapes[signal][0]
        ends = ends + width
        op = Slice(start, ends) if steered else Mix(width)
        extra.append(Node(given[signal], op, (stream,)))
        shapes[given[signal]] = (width,)
    inner = [Node(n.name, n.op, tuple(given.get(a, a) for a in n.args)) for n in nodes]
    output, outer = result, list[Node]()
    if steered:
        missing, output = names.free("missing"), names.free("sum")
        outer = [Node(missing, Mix(graph.shapes[result][0]), (stream,)), Node(output, Add(), (result, missing))]
        shapes |= {missing: graph.shapes[result], output: graph.shapes[result]}
    used = {a for n in nodes for a in n.args}
    stored = tuple(p for p in graph.parameters if p.name in used)
    shapes |= {stream: (ends,), **{p.name: p.shape for p in stored}, **{n.name: graph.shapes[n.name] for n in nodes}}
    # not by `build`: this stream is as wide as all that the component reads, and its result may be of another width
    return Graph(stream, output, ends, stored, (*extra, *inner, *outer), shapes)


class _Names:
    """Names that the graph does not use."""

    def __init__(self, graph: Graph) -> None:
        self._taken = {graph.input, *graph.node, *graph.parameter}

    def free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
