"""The frozen graph of primitive operations that every front end lowers to.

Integrity is checked when a graph is built: names, arguments, cycles and shapes. Every graph that
exists can be judged, planned and (with numbers) run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TypeAlias

from ..display import picture, tagged
from ..errors import BadInput
from .ops import Argument, Op, Shape
from .sizes import Size

LONGEST_NAME = 1000
Globs: TypeAlias = str | Iterable[str]  # one pattern of names, or several


@dataclass(frozen=True)
class Parameter:
    """A stored array: a matrix `[d_out, d_in]` or a vector `[width]`.

    Attributes:
        tied: also used outside this graph, so it may not move.
        frozen: may not move because the user says so.
    """

    name: str
    shape: Shape
    tied: bool = False
    frozen: bool = False

    @property
    def numbers(self) -> Size:
        """How many numbers it holds."""
        return self.shape[0] if len(self.shape) == 1 else self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Node:
    """One operation: its arguments are names of nodes, of parameters, or the graph's input."""

    name: str
    op: Op
    args: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A block: from the residual stream of a token (`input`) to its value after the block (`output`).

    `nodes` are in topological order. Build graphs with `Graph.build`, which takes any order.
    """

    input: str
    output: str
    width: Size
    parameters: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    shapes: Mapping[str, Shape] = field(compare=False, hash=False)

    def __repr__(self) -> str:
        size = f"{len(self.nodes)} operations, {len(self.parameters)} parameters, width {self.width}"
        return tagged(self, f"{self.input} -> {self.output}, {size}")

    def _repr_svg_(self) -> str | None:
        return picture(self)

    @staticmethod
    def build(
        input: str,
        output: str,
        width: Size,
        parameters: Iterable[Parameter],
        nodes: Iterable[Node],
    ) -> Graph:
        """Checks names, orders the nodes and infers the shapes.

        Raises:
            BadInput: a duplicate or unknown name, a cycle, or arguments that do not fit.
        """
        stored, listed = tuple(parameters), tuple(nodes)
        _check_names(input, output, stored, listed)
        ordered = _topological(listed)
        shapes = _infer(input, width, stored, ordered)
        if shapes[output] != (width,):
            raise BadInput(
                f"the output {output!r} has width {shapes[output][0]}, the residual stream has {width}; "
                "a block keeps the width"
            )
        return Graph(input, output, width, stored, ordered, shapes)

    @cached_property
    def node(self) -> dict[str, Node]:
        """The nodes by name."""
        return {n.name: n for n in self.nodes}

    @cached_property
    def parameter(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return {p.name: p for p in self.parameters}

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of every node in the order of evaluation."""
        return {n.name: i for i, n in enumerate(self.nodes)}

    @cached_property
    def uses(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """For every value and parameter that matters to the output: the (node, position) pairs that read it."""
        found: dict[str, list[tuple[str, int]]] = {}
        for node in self.nodes:
            if node.name in self.relevant:
                for position, arg in enumerate(node.args):
                    found.setdefault(arg, []).append((node.name, position))
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def relevant(self) -> frozenset[str]:
        """The nodes that the output depends on, the output among them."""
        seen: set[str] = {self.output}
        for node in reversed(self.nodes):
            if node.name in seen:
                seen.update(node.args)
        return frozenset(seen & self.node.keys())

    @cached_property
    def contextual(self) -> frozenset[str]:
        """The nodes whose value depends on what else stands in the sequence."""
        found: set[str] = set()
        for node in self.nodes:
            if node.op.mixing or any(a in found for a in node.args):
                found.add(node.name)
        return frozenset(found)

    @cached_property
    def before_mixing(self) -> frozenset[str]:
        """Nodes and parameters upstream of a mixing node (the mixing nodes' own parameters included)."""
        found: set[str] = set()
        for node in reversed(self.nodes):
            if node.op.mixing or node.name in found:
                found.update(node.args)
        return frozenset(found)

    def arguments(self, node: Node) -> tuple[Argument, ...]:
        """What the node's operation knows of its arguments: their shapes, and which are parameters."""
        return self._arguments[node.name]

    @cached_property
    def _arguments(self) -> dict[str, tuple[Argument, ...]]:
        known = {name: Argument(shape, name in self.parameter) for name, shape in self.shapes.items()}
        return {n.name: tuple(known[a] for a in n.args) for n in self.nodes}

    def bound(self, constants: Mapping[str, object]) -> Graph:
        """The same graph with numbers put in for symbols: in the parameters' shapes, the operations and the width."""
        stored = [replace(p, shape=tuple(s.bind(constants) for s in p.shape)) for p in self.parameters]
        nodes = [replace(n, op=_bound_op(n.op, constants)) for n in self.nodes]
        return Graph.build(self.input, self.output, self.width.bind(constants), stored, nodes)

    def restricted(self, only: Globs = (), freeze: Globs = ()) -> Graph:
        """The same graph with parameters frozen: those no `only` glob matches, and those a `freeze` glob does.

        One glob may stand without a list.

        Raises:
            BadInput: a pattern matches no parameter.
        """
        only, freeze = globs("only", only), globs("freeze", freeze)
        names = [p.name for p in self.parameters]
        for pattern in (*only, *freeze):
            if not any(fnmatchcase(n, pattern) for n in names):
                raise BadInput(f"{pattern!r:.80} matches no parameter; there are {listed(names)}")

        def held(name: str) -> bool:
            chosen = not only or any(fnmatchcase(name, p) for p in only)
            return not chosen or any(fnmatchcase(name, p) for p in freeze)

        stored = tuple(replace(p, frozen=p.frozen or held(p.name)) for p in self.parameters)
        return replace(self, parameters=stored)


def globs(name: str, given: Globs) -> tuple[str, ...]:
    """Patterns of names; one alone may stand without a list.

    Raises:
        BadInput: what was given as `name` is something else.
    """
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise BadInput(
            f"{name} must be a list of globs of parameter names ('*.bias'), or one of them, got {given!r:.60}"
        )
    return found


def _bound_op(op: Op, constants: Mapping[str, object]) -> Op:
    sizes = {f.name: getattr(op, f.name) for f in fields(op)}  # type: ignore[arg-type]
    known = {name: size.bind(constants) for name, size in sizes.items() if isinstance(size, Size)}
    return replace(op, **known) if known else op  # type: ignore[type-var]


def _check_names(input: str, output: str, parameters: tuple[Parameter, ...], nodes: tuple[Node, ...]) -> None:
    known: set[str] = set()
    for name in (input, *(p.name for p in parameters), *(n.name for n in nodes)):
        if name in known:
            shared = f"two things are named {name!r}: the input, parameters and nodes need names of their own"
            raise BadInput(shared, at=name)
        if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
            raise BadInput(f"{name!r:.80} is no name: allowed are 1 to {LONGEST_NAME} printable characters", at=name)
        known.add(name)
    for node in nodes:
        for arg in node.args:
            if arg not in known:
                missing = f"node {node.name!r} reads {arg!r:.80}, which does not exist{suggest(arg, known)}"
                raise BadInput(missing, at=node.name)
    if output not in {n.name for n in nodes}:
        raise BadInput(f"the output {output!r:.80} is not a node{suggest(output, known)}")
    read = {a for n in nodes for a in n.args}
    for p in parameters:
        if p.name not in read:
            raise BadInput(f"parameter {p.name!r} is not used by any node; remove it or use it", at=p.name)
    for node in nodes:
        if node.name not in read and node.name != output:
            lost = f"node {node.name!r} leads nowhere: nothing reads it and it is not the output"
            raise BadInput(lost, at=node.name)


def listed(names: Iterable[str], most: int = 30) -> str:
    """The names for a message: the first of them, where there are many."""
    all_ = list(names)
    return ", ".join([*all_[:most], *([f"and {len(all_) - most} more"] if len(all_) > most else [])]) or "none"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt name."""
    close = get_close_matches(name, known, n=3) if len(name) <= LONGEST_NAME else []
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """`nearest`, or else the names there are when there are few."""
    options = list(known)
    if meant := nearest(name, options):
        return meant
    return f"; there are {', '.join(sorted(options))}" if len(options) <= 30 else ""


def _topological(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Kahn's order.

    Raises:
        BadInput: there is a cycle; the message shows one.
    """
    by_name = {n.name: n for n in nodes}
    waiting = {n.name: len({a for a in n.args if a in by_name}) for n in nodes}
    readers: dict[str, list[str]] = {}
    for n in nodes:
        for a in set(n.args):
            readers.setdefault(a, []).append(n.name)
    ready = deque(n.name for n in nodes if not waiting[n.name])
    ordered = []
    while ready:
        name = ready.popleft()
        ordered.append(by_name[name])
        for reader in readers.get(name, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(ordered) < len(nodes):
        cycle = _cycle(by_name, waiting)
        raise BadInput(f"the graph has a cycle: {' -> '.join(cycle)}", at=cycle[0])
    return tuple(ordered)


def _cycle(by_name: Mapping[str, Node], waiting: Mapping[str, int]) -> list[str]:
    name = next(n for n, count in waiting.items() if count)
    trail: dict[str, None] = {}
    while name not in trail:
        trail[name] = None
        name = next(a for a in by_name[name].args if waiting.get(a))
    loop = list(trail)[list(trail).index(name) :]
    shown = loop if len(loop) <= 12 else [*loop[:6], "...", *loop[-5:]]
    return list(reversed([*shown, name]))


def _infer(input: str, width: Size, parameters: tuple[Parameter, ...], nodes: tuple[Node, ...]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {input: (width,)}
    for p in parameters:
        if len(p.shape) not in (1, 2) or any(s.known is not None and s.known < 1 for s in p.shape):
            raise BadInput(f"parameter {p.name!r} must be a vector or a matrix of positive sizes", at=p.name)
        shapes[p.name] = p.shape
    stored = {p.name for p in parameters}
    for node in nodes:
        try:
            shapes[node.name] = node.op.infer([Argument(shapes[a], a in stored) for a in node.args])
        except BadInput as error:
            raise BadInput(f"node {node.name!r}: {error} (arguments {listed(node.args)})", at=node.name) from None
    return shapes
