"""Two designs side by side: patchable or not, for how many tokens, at what cost in stored numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

from . import api
from .design.architecture import Architecture
from .display import tagged
from .errors import BadInput
from .graph.graph import Globs, Graph, globs
from .graph.sizes import Size
from .planner.plan import STRATEGIES, offers
from .planner.route import Route
from .planner.routes import Planner
from .planner.verdict import Verdict, judge

MOST_SHOWN = 4  # routes and obstructions in the table
WIDEST = 52  # characters of a column


@dataclass(frozen=True)
class Cost:
    """What a strategy stores.

    Attributes:
        route: for a block (of the first kind, where there are several).
        block: numbers for a block, the most that any kind needs.
        model: numbers for all layers; None where the number of layers is not known.
    """

    route: Route
    block: Size
    model: Size | None


@dataclass(frozen=True)
class Side:
    """One of the designs.

    Attributes:
        costs: by strategy, those that every kind of block admits.
        layers: the number of layers, where it is known.
    """

    name: str
    verdict: Verdict
    costs: Mapping[str, Cost]
    layers: int | None


@dataclass(frozen=True)
class Comparison:
    """Two designs, asked the same questions."""

    left: Side
    right: Side

    def __repr__(self) -> str:
        return tagged(self, f"{self.left.name} and {self.right.name}")

    def __str__(self) -> str:
        return _table(self.left, self.right)


def compare(
    left: api.Spec,
    right: api.Spec,
    only: Globs = (),
    freeze: Globs = (),
    tokens: int | None = None,
    components: api.Components = (),
) -> Comparison:
    """The two designs side by side.

    Args:
        only, freeze: as for `check`; a glob has to match a parameter in one of the designs at least.
        tokens: how many tokens one static patch must serve.

    Raises:
        BadInput: a spec cannot be read, or a glob matches nothing in either design.
    """
    api.require_positive(tokens)
    designs = [api.load(left, components), api.load(right, components)]
    names = [_name(given, design) for given, design in zip((left, right), designs, strict=True)]
    graphs = [_graphs(given, design) for given, design in zip((left, right), designs, strict=True)]
    only, freeze = globs("only", only), globs("freeze", freeze)
    known = {p.name for found in graphs for g in found.values() for p in g.parameters}
    for pattern in (*only, *freeze):
        if not any(fnmatchcase(name, pattern) for name in known):
            raise BadInput(f"{pattern!r} matches no parameter of {names[0]} or {names[1]}; there are {_listed(known)}")
    sides = [
        _side(name, design, {kinds: _restricted(g, only, freeze) for kinds, g in found.items()}, tokens)
        for name, design, found in zip(names, designs, graphs, strict=True)
    ]
    return Comparison(*sides)


def _graphs(given: api.Spec, design: Architecture | Graph) -> dict[tuple[str, ...], Graph]:
    try:
        return api.distinct_graphs(design)
    except BadInput as error:
        raise api.said_of(given, error) from None


def _name(given: api.Spec, design: Architecture | Graph) -> str:
    if isinstance(given, str | Path):
        return str(given)
    return design.name if isinstance(design, Architecture) else "graph"


def _listed(names: Iterable[str], most: int = 30) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "") if ordered else "none"


def _restricted(graph: Graph, only: tuple[str, ...], freeze: tuple[str, ...]) -> Graph:
    """As `Graph.restricted`, for patterns that need not match anything here."""
    names = [p.name for p in graph.parameters]
    here = [tuple(p for p in patterns if any(fnmatchcase(n, p) for n in names)) for patterns in (only, freeze)]
    if only and not here[0]:
        return replace(graph, parameters=tuple(replace(p, frozen=True) for p in graph.parameters))
    return graph.restricted(*here)


def _side(name: str, design: Architecture | Graph, graphs: Mapping[tuple[str, ...], Graph], tokens: int | None) -> Side:
    verdict = api.joint_verdict({kinds: judge(g, tokens) for kinds, g in graphs.items()})
    offered = {kinds: offers(Planner(g), tokens) for kinds, g in graphs.items() if g.output in g.contextual}
    depth = design.depth if isinstance(design, Architecture) else None
    costs = {}
    for strategy in STRATEGIES:
        found = {kind: routes[strategy] for kinds, routes in offered.items() if strategy in routes for kind in kinds}
        if found and len(found) == sum(map(len, offered)):
            costs[strategy] = _cost(design, found, depth)
    return Side(name, verdict, costs, depth)


def _cost(design: Architecture | Graph, found: Mapping[str, Route], depth: int | None) -> Cost:
    block = max((r.numbers for r in found.values()), key=Size.estimate)
    model = None
    if isinstance(design, Architecture) and depth is not None:
        pattern = design.layers.pattern if design.layers else ()
        whole, rest = divmod(depth, len(pattern))
        model = Size.of(0)
        for position, kind in enumerate(pattern):
            if kind in found:
                model = model + found[kind].numbers * Size.of(whole + (position < rest))
    return Cost(next(iter(found.values())), block, model)


# -- the table -----------------------------------------------------------------------------------


def _table(left: Side, right: Side) -> str:
    rows = [("", left.name, right.name), *zip(_LABELS, _summary(left), _summary(right), strict=True)]
    rows.extend((f"numbers stored, {s}", _stored(left, s), _stored(right, s)) for s in STRATEGIES)
    rows.extend(_listed_rows("routes (tokens)", _routes(left), _routes(right)))
    rows.extend(_listed_rows("why not", _reasons(left), _reasons(right)))
    return _columns(rows)


def _routes(side: Side) -> list[str]:
    return [f"{' + '.join(r.parameters) or 'nothing to do'} ({r.capacity})" for r in side.verdict.routes]


def _reasons(side: Side) -> list[str]:
    return [o.reason for o in side.verdict.obstructions]


_LABELS = ("patchable", "tokens that one static patch serves", "layers")


def _summary(side: Side) -> tuple[str, str, str]:
    answer = {True: "yes", False: "no", None: "unknown"}[side.verdict.patchable]
    return answer, str(side.verdict.capacity), str(side.layers or "-")


def _stored(side: Side, strategy: str) -> str:
    cost = side.costs.get(strategy)
    if cost is None:
        return "no route"
    return str(cost.block) if cost.model is None else f"{cost.block} a block, {cost.model} in all"


def _listed_rows(label: str, left: list[str], right: list[str]) -> Iterator[tuple[str, str, str]]:
    more, also = (f"and {len(s) - MOST_SHOWN} more" if len(s) > MOST_SHOWN else "" for s in (left, right))
    for number, (a, b) in enumerate(zip_longest(left[:MOST_SHOWN], right[:MOST_SHOWN], fillvalue="")):
        yield ("" if number else label, a, b)
    if more or also:
        yield ("", more, also)


def _columns(rows: list[tuple[str, str, str]]) -> str:
    """The rows in columns; long cells go on in the next line."""
    first = max(len(row[0]) for row in rows)
    wide = [min(WIDEST, max(len(row[i]) for row in rows)) for i in (1, 2)]
    lines = []
    for label, *cells in rows:
        wrapped = [wrap(cell, WIDEST, subsequent_indent="  ") or [""] for cell in cells]
        for number, (a, b) in enumerate(zip_longest(*wrapped, fillvalue="")):
            shown = "" if number else label
            lines.append(f"{shown:<{first}}  {a:<{wide[0]}}  {b:<{wide[1]}}".rstrip())
    return "\n".join(lines)
