"""What a drawing of a block shows, whatever draws it: boxes, edges, controls and the chosen route.

Nodes that belong to one component (`mlp.up_proj.out`, `mlp.hidden`: all before the first dot) share a box.
Nodes of a raw graph, whose names have no dots, have a box each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..errors import BadInput
from ..graph.graph import Graph, Node
from ..graph.ops import Activation, Add, Multiply
from ..planner.controls import Controls, controls_of
from ..planner.route import Route

MOST_BOXES = 1000


class Paint(Enum):
    """The colour of a box, by what its component can do."""

    BOTH = "input and output control"
    INPUT = "input control only"
    OUTPUT = "output control only"
    NEITHER = "neither"
    MIXING = "mixing: looks at other tokens"
    STREAM = "residual stream"


class Form(Enum):
    """The shape of a box."""

    STREAM = "stream"
    COMPONENT = "component"
    SUM = "sum"
    PRODUCT = "product"


@dataclass(frozen=True)
class Box:
    """A component, an operation between components, or the residual stream.

    Attributes:
        nodes: the graph's nodes in it.
        operations: what they do, in order, for a person.
        solved: the parameters in it that the chosen route solves for.
        on_route: whether the chosen route passes it.
    """

    name: str
    form: Form
    nodes: tuple[str, ...]
    operations: tuple[str, ...]
    paint: Paint
    controls: Controls | None
    solved: tuple[str, ...]
    on_route: bool

    @property
    def abilities(self) -> str:
        """Its controls in a few words, those that are certain without more."""
        if self.controls is None:
            return ""
        both = {"input": self.controls.input_control, "output": self.controls.output_control}
        held = [f"{n} ({c.status})" if c.holds is None else n for n, c in both.items() if c.holds is not False]
        return f"{' + '.join(held)} control" if held else "no control"


@dataclass(frozen=True)
class Drawing:
    """Boxes from the stream to the output, in an order in which every edge points forward.

    Attributes:
        edges: pairs of indices into `boxes`.
        route_edges: those along which the chosen route pulls its target back.
        output: the index of the box that holds the block's output.
    """

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    route_edges: frozenset[tuple[int, int]]
    output: int


def draw(graph: Graph, route: Route | None = None) -> Drawing:
    """The boxes and edges of a block.

    Raises:
        BadInput: there are too many components for a drawing.
    """
    groups = _groups(graph)
    if len(groups) > MOST_BOXES:
        raise BadInput(f"the block has {len(groups)} components; a drawing shows up to {MOST_BOXES}")
    place = {name: i for i, (_, names) in enumerate(groups, 1) for name in names} | {graph.input: 0}
    links = [link for step in route.steps for link in step.path] if route else []
    reached = {link.node for link in links} | {n for step in (route.steps if route else ()) for n in step.region}
    solved = frozenset(route.parameters if route else ())
    stream = Box(graph.input, Form.STREAM, (), (), Paint.STREAM, None, (), False)
    boxes = [stream, *(_box(graph, name, nodes, reached, solved) for name, nodes in groups)]
    edges = dict.fromkeys(
        (place[a], place[n.name]) for n in graph.nodes for a in n.args if a in place and place[a] != place[n.name]
    )
    pulled = ((graph.node[k.node].args[k.position], k.node) for k in links)
    back = frozenset((place[a], place[n]) for a, n in pulled if a in place)
    return Drawing(tuple(boxes), tuple(edges), back & edges.keys(), place[graph.output])


def _box(graph: Graph, name: str, names: tuple[str, ...], reached: set[str], solved: frozenset[str]) -> Box:
    nodes = [graph.node[n] for n in names]
    stored = tuple(dict.fromkeys(a for n in nodes for a in n.args if a in graph.parameter))
    found = controls_of(graph, names) if stored else None
    return Box(
        name=name,
        form=_form(nodes, stored),
        nodes=names,
        operations=tuple(_operation(n, graph) for n in nodes),
        paint=_paint(nodes, found),
        controls=found,
        solved=tuple(p for p in stored if p in solved),
        on_route=any(n in reached for n in names),
    )


def _form(nodes: list[Node], stored: Iterable[str]) -> Form:
    if len(nodes) == 1 and not stored and isinstance(nodes[0].op, Add | Multiply):
        return Form.SUM if isinstance(nodes[0].op, Add) else Form.PRODUCT
    return Form.COMPONENT


def _operation(node: Node, graph: Graph) -> str:
    if isinstance(node.op, Activation):
        return node.op.fn
    if isinstance(node.op, Add) and any(a in graph.parameter for a in node.args):
        return "bias"
    if isinstance(node.op, Multiply) and any(a in graph.parameter for a in node.args):
        return "gain"
    return node.op.kind


def _paint(nodes: list[Node], found: Controls | None) -> Paint:
    if any(n.op.mixing for n in nodes):
        return Paint.MIXING
    if found is None:
        return Paint.NEITHER
    able = found.input_control.able, found.output_control.able
    return {(True, True): Paint.BOTH, (True, False): Paint.INPUT, (False, True): Paint.OUTPUT}.get(able, Paint.NEITHER)


def _groups(graph: Graph) -> list[tuple[str, tuple[str, ...]]]:
    """The nodes that share a box, in topological order of the boxes.

    Nodes with one prefix that a path leaves and enters again cannot share a box; they get one each.
    """
    nodes = [n for n in graph.nodes if n.name in graph.relevant]
    group = {n.name: n.name.partition(".")[0] or n.name for n in nodes}
    while True:
        ordered, stuck = _ordered(nodes, group)
        if not stuck:
            members: dict[str, list[str]] = {}
            for n in nodes:
                members.setdefault(group[n.name], []).append(n.name)
            return [(members[g][0] if len(members[g]) == 1 else g, tuple(members[g])) for g in ordered]
        group |= {name: f"{g}\n{name}" for name, g in group.items() if g in stuck}


def _ordered(nodes: list[Node], group: dict[str, str]) -> tuple[list[str], set[str]]:
    """The groups in topological order, and those that stand in a circle."""
    readers: dict[str, dict[str, None]] = {g: {} for g in group.values()}
    for n in nodes:
        for a in n.args:
            if a in group and group[a] != group[n.name]:
                readers[group[a]][group[n.name]] = None
    waiting = dict.fromkeys(readers, 0)
    for found in readers.values():
        for g in found:
            waiting[g] += 1
    ordered = [g for g, count in waiting.items() if not count]
    for g in ordered:
        for reader in readers[g]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ordered.append(reader)
    return ordered, {g for g, count in waiting.items() if count}
