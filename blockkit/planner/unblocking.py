"""The smallest changes of a design that would make it patchable, each verified by judging the changed graph.

Every change is a set of edits. Which sets are worth a judgement is read off the routes of a *relaxed* graph, in
which all edits are made at once: a route there needs exactly the edits that it passes. So the work is one plan of
the relaxed graph and a bounded number of judgements, whatever the size of the design.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain, islice

from ..graph.graph import Graph, Node, Parameter
from ..graph.ops import FUNCTIONS, Activation, Add, LayerNorm, Multiply, RMSNorm, Softcap, Vanish
from ..graph.reach import Reach
from ..graph.sizes import Size
from .analysis.facts import Facts
from .route import Route, Step
from .routes import Planner
from .verdict import Verdict, judge, routes_of

MOST_JUDGEMENTS = 200
MOST_WORK = 40_000  # nodes judged, all judgements together
LEAST_JUDGEMENTS = 2
LARGE = 20_000  # nodes; of a larger graph only one relaxation is planned
MOST_EDITS = 4  # a change of more edits is another design
MOST_EDITED = 400  # edits considered, those nearest to the output first
MOST_SHOWN = 5
MOST_ALIKE = 2  # of the changes shown, those that do the same thing in another place
BIJECTION = next(name for name, known in FUNCTIONS.items() if known.bijective and name != "identity")


class Make(Enum):
    """What an edit does."""

    FREE = "free"
    UNTIE = "untie"
    SPLIT = "split"
    SCALE = "scale"
    BIAS = "bias"
    REPLACE = "replace"
    DROP = "drop"


KEEPS_FUNCTION = (Make.FREE, Make.UNTIE, Make.SPLIT, Make.SCALE, Make.BIAS)  # a scale starts at one, a bias at zero
UNDOES = (Make.FREE, Make.UNTIE, Make.SPLIT, Make.SCALE, Make.REPLACE, Make.DROP)  # the obstacle itself is gone


@dataclass(frozen=True)
class Edit:
    """One edit of a graph.

    Attributes:
        make: what is done.
        at: the parameter (free, untie) or the node (all others) at which it is done.
        parameter: for a split, the parameter of which the node gets a copy of its own.
    """

    make: Make
    at: str
    parameter: str = ""

    def text(self, graph: Graph) -> str:
        """What is done, as an instruction to a designer."""
        match self.make:
            case Make.FREE | Make.UNTIE:
                return f"{self.make.value} {self.at}"
            case Make.SPLIT:
                return f"give the use of {self.parameter} at {self.at} its own parameter"
            case Make.SCALE:
                return f"give {self.at} a scale"
            case Make.BIAS:
                return f"add a bias {'at the output' if self.at == graph.output else f'behind {self.at}'}"
            case Make.REPLACE:
                op = graph.node[self.at].op
                fn = op.fn if isinstance(op, Activation) else op.kind
                return f"replace {fn} at {self.at} by a bijective activation ({BIJECTION})"
            case Make.DROP:
                return f"drop {self.at} ({graph.node[self.at].op.kind})"

    def numbers(self, graph: Graph) -> Size:
        """How many numbers the design stores more than before."""
        if self.make in (Make.UNTIE, Make.SPLIT):
            return graph.parameter[self.parameter or self.at].numbers
        return graph.shapes[self.at][0] if self.make in (Make.SCALE, Make.BIAS) else Size.of(0)


@dataclass(frozen=True)
class Change:
    """Edits that together make a design patchable, and the verdict on the changed design.

    Attributes:
        text: the edits in words.
        parameters: the parameters that are freed, untied or split.
        nodes: the nodes that are replaced, dropped or given a parameter.
        numbers: how many numbers the changed design stores more.
        keeps_function: whether the block computes what it did, until it is patched.
    """

    text: str
    edits: tuple[Edit, ...]
    parameters: tuple[str, ...]
    nodes: tuple[str, ...]
    numbers: Size
    keeps_function: bool
    verdict: Verdict


@dataclass(frozen=True)
class Changes:
    """What was found, the smallest change first; `capped` says what was left untried, if anything."""

    found: tuple[Change, ...]
    blocking: tuple[str, ...]
    capped: str = ""


def edited(graph: Graph, edits: Collection[Edit]) -> Graph:
    """The graph with the edits made; new parameters are named after the node that they are added to.

    Raises:
        BadInput: the edits do not fit the graph.
    """
    return _Editor(graph, edits).graph


def smallest_changes(graph: Graph, tokens: int | None = None) -> Changes:
    """The smallest changes that make a design patchable for `tokens` tokens, all verified, none part of another."""
    edits = list(islice(_possible(graph), MOST_EDITED + 1))
    capped = f"only the {MOST_EDITED} edits nearest to the output were considered" if len(edits) > MOST_EDITED else ""
    budget = min(MOST_JUDGEMENTS, max(LEAST_JUDGEMENTS, MOST_WORK // len(graph.nodes)))
    found: list[Change] = []
    for wanted in _candidates(graph, edits[:MOST_EDITED], tokens):
        if len(found) == MOST_SHOWN:
            break
        if any(set(c.edits) <= wanted for c in found) or _alike(found, wanted) == MOST_ALIKE:
            continue
        if not budget:
            capped = "more changes may do; the search was ended for the size of the graph"
            break
        budget -= 1
        verdict = judge(edited(graph, wanted), tokens)
        if verdict.patchable:
            found.append(_described(graph, wanted, verdict))
    undoing = next((c for c in found if all(e.make in UNDOES for e in c.edits)), None)
    return Changes(tuple(found), tuple(e.parameter or e.at for e in undoing.edits) if undoing else (), capped)


def _alike(found: Iterable[Change], edits: Iterable[Edit]) -> int:
    kind = sorted(e.make.value for e in edits)
    return sum(sorted(e.make.value for e in c.edits) == kind for c in found)


def _described(graph: Graph, edits: Iterable[Edit], verdict: Verdict) -> Change:
    ordered = tuple(sorted(edits, key=lambda e: (e.make.value, e.at, e.parameter)))
    total = Size.of(0)
    for edit in ordered:
        total = total + edit.numbers(graph)
    return Change(
        text=" and ".join(e.text(graph) for e in ordered),
        edits=ordered,
        parameters=tuple(dict.fromkeys(e.parameter or e.at for e in ordered if e.parameter or e.at in graph.parameter)),
        nodes=tuple(dict.fromkeys(e.at for e in ordered if e.at in graph.node)),
        numbers=total,
        keeps_function=all(e.make in KEEPS_FUNCTION for e in ordered),
        verdict=verdict,
    )


# -- which edits there are -----------------------------------------------------------------------


def _possible(graph: Graph) -> Iterator[Edit]:
    """Every edit that may help, those at and near the output first."""
    fixed = graph.before_mixing
    yield Edit(Make.BIAS, graph.output)
    for node in reversed(graph.nodes):
        if node.name not in graph.relevant or node.name in fixed:
            continue
        for arg in dict.fromkeys(node.args):
            parameter = graph.parameter.get(arg)
            if parameter is None or arg in fixed:
                continue
            if parameter.frozen:
                yield Edit(Make.FREE, arg)
            if parameter.tied:
                yield Edit(Make.UNTIE, arg)
            if len(graph.uses[arg]) > 1:
                yield Edit(Make.SPLIT, node.name, arg)
        yield from _at_bounding(graph, node)


def _at_bounding(graph: Graph, node: Node) -> Iterator[Edit]:
    """The edits of an operation whose results are limited, whatever it reads."""
    if node.op.mixing or not _limits(graph, node):
        return
    if isinstance(node.op, RMSNorm | LayerNorm):
        if not _has_scale(graph, node):
            yield Edit(Make.SCALE, node.name)
        yield Edit(Make.DROP, node.name)
    elif isinstance(node.op, Softcap):
        yield Edit(Make.DROP, node.name)
    elif isinstance(node.op, Activation):
        yield Edit(Make.REPLACE, node.name)
    if node.name != graph.output:
        yield Edit(Make.BIAS, node.name)


def _limits(graph: Graph, node: Node) -> bool:
    """Whether the operation cannot be solved for one of its signals, or may vanish of itself."""
    shapes = graph.arguments(node)
    laws = (node.op.law(i, shapes) for i, arg in enumerate(node.args) if arg in graph.node)
    limited = any(law is None or law.reach is not Reach.ALL for law in laws)
    return limited or bool(node.op.vanishing([Vanish.NEVER] * len(shapes)))


def _has_scale(graph: Graph, norm: Node) -> bool:
    readers = graph.uses.get(norm.name, ())
    return any(
        isinstance(graph.node[r].op, Multiply) and any(a in graph.parameter for a in graph.node[r].args)
        for r, _ in readers
    )


# -- which sets of edits to try ------------------------------------------------------------------


def _candidates(graph: Graph, edits: list[Edit], tokens: int | None) -> list[frozenset[Edit]]:
    """Sets of edits, the smallest change first."""
    flags = [e for e in edits if e.make in (Make.FREE, Make.UNTIE)]
    sets = chain(
        (frozenset([e]) for e in flags),
        _needed(graph, flags, tokens) if flags and len(graph.nodes) <= LARGE else (),
        _needed(graph, edits, tokens),
    )
    distinct = dict.fromkeys(s for s in sets if s and len(s) <= MOST_EDITS)
    return sorted(distinct, key=lambda s: _cost(graph, s))


def _cost(graph: Graph, edits: frozenset[Edit]) -> tuple[int, bool, bool, int, int]:
    """Few edits, the same function, the obstacle itself undone, few new numbers, near the output."""
    return (
        len(edits),
        any(e.make not in KEEPS_FUNCTION for e in edits),
        any(e.make not in UNDOES for e in edits),
        sum(e.numbers(graph).estimate() for e in edits),
        -min(graph.index[e.at] if e.at in graph.node else graph.index[graph.uses[e.at][-1][0]] for e in edits),
    )


def _needed(graph: Graph, edits: list[Edit], tokens: int | None) -> Iterator[frozenset[Edit]]:
    """For every route of the relaxed graph, the edits that it passes."""
    editor = _Editor(graph, edits)
    planner, sources = Planner(editor.graph), _Vanishing(graph)
    for route in routes_of(planner):
        if tokens is not None and route.capacity.serves(tokens) is False:
            continue
        passed = frozenset(chain.from_iterable(editor.passed(step) for step in route.steps))
        yield passed
        if beside := sources.beside(route) & set(edits):
            yield passed | beside


class _Vanishing:
    """Which operations make a factor vanish for whole regions of contexts."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.vanishing = Facts(graph).vanishing

    def beside(self, route: Route) -> set[Edit]:
        """The replacements that keep the route's factors from vanishing."""
        links = [link for step in route.steps for link in step.path if link.node in self.graph.node]
        factors = {self.graph.node[k.node].args[p] for k in links for p in k.law.nonzero}
        return set(chain.from_iterable(self._sources(f) for f in factors if f in self.vanishing))

    def _sources(self, factor: str) -> Iterator[Edit]:
        seen, stack = {factor}, [factor]
        while stack:
            node = self.graph.node[stack.pop()]
            if node.op.vanishing([Vanish.NEVER] * len(node.args)):
                yield Edit(Make.REPLACE, node.name)
                continue
            new = [a for a in node.args if a in self.vanishing and a not in seen]
            seen.update(new)
            stack.extend(new)


# -- making them ---------------------------------------------------------------------------------


class _Editor:
    """A graph with edits made, and which edit stands behind each of its new or altered parts."""

    def __init__(self, graph: Graph, edits: Collection[Edit]) -> None:
        self._taken = {graph.input, *graph.node, *graph.parameter}
        self._old = graph
        self._by_node: dict[str, list[Edit]] = {}
        self._of_parameter: dict[str, list[Edit]] = {}
        self._of_node: dict[str, Edit] = {}
        flags: dict[str, set[Make]] = {}
        for edit in edits:
            if edit.make in (Make.FREE, Make.UNTIE):
                flags.setdefault(edit.at, set()).add(edit.make)
                self._of_parameter.setdefault(edit.at, []).append(edit)
            else:
                self._by_node.setdefault(edit.at, []).append(edit)
        self._parameters = {p.name: _released(p, flags.get(p.name, set())) for p in graph.parameters}
        self._nodes: list[Node] = []
        self._now = {n.name: n.name for n in graph.nodes}  # which node holds the value that this one held
        for node in graph.nodes:
            self._edit(node)
        read = {a for n in self._nodes for a in n.args}
        stored = [p for p in self._parameters.values() if p.name in read]
        self.graph = Graph.build(graph.input, self._now[graph.output], graph.width, stored, self._nodes)

    def passed(self, step: Step) -> Iterator[Edit]:
        """The edits without which the step would not be there."""
        yield from self._of_parameter.get(step.parameter, ())
        for name in (*(link.node for link in step.path), *step.region):
            if name in self._of_node:
                yield self._of_node[name]

    def _edit(self, node: Node) -> None:
        edits = {e.make: e for e in self._by_node.get(node.name, ()) if e.make is not Make.SPLIT}
        own = {e.parameter: e for e in self._by_node.get(node.name, ()) if e.make is Make.SPLIT}
        args = [self._now.get(a, a) for a in node.args]
        for position, arg in enumerate(node.args):
            if arg in own:
                args[position] = self._store(f"{arg}.own", self._old.parameter[arg].shape, own.pop(arg))
        op = node.op
        for make, fn in ((Make.REPLACE, BIJECTION), (Make.DROP, "identity")):
            if make in edits:
                op = Activation(fn)
                self._of_node[node.name] = edits[make]
        self._nodes.append(replace(node, op=op, args=tuple(args)))
        for make, joined in ((Make.SCALE, Multiply()), (Make.BIAS, Add())):
            if make in edits:
                stored = self._store(f"{node.name}.{make.value}", self._old.shapes[node.name], edits[make])
                name = self._free(f"{node.name}.with_{make.value}")
                self._nodes.append(Node(name, joined, (self._now[node.name], stored)))
                self._now[node.name] = name

    def _store(self, name: str, shape: tuple[Size, ...], edit: Edit) -> str:
        free = self._free(name)
        self._parameters[free] = Parameter(free, shape)
        self._of_parameter[free] = [edit]
        return free

    def _free(self, name: str) -> str:
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found


def _released(parameter: Parameter, makes: set[Make]) -> Parameter:
    return replace(
        parameter,
        frozen=parameter.frozen and Make.FREE not in makes,
        tied=parameter.tied and Make.UNTIE not in makes,
    )
