"""The answer to "is this block patchable?", with the routes that say yes or the reasons that say no."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..display import short, table
from ..graph.graph import Graph
from ..graph.laws import Kind, legend
from ..graph.sizes import Capacity
from .refutation import Refutation
from .route import Obstruction, Route
from .routes import Planner


@dataclass(frozen=True)
class Verdict:
    """What the planner found for one graph.

    Attributes:
        patchable: True, False, or None where it is unknown or hangs on an open condition or a size.
        capacity: the most tokens that one static patch of a route can serve.
        routes: every way to patch, the outermost parameter first.
        obstructions: why not, where `patchable` is not True.
    """

    patchable: bool | None
    capacity: Capacity
    routes: tuple[Route, ...]
    obstructions: tuple[Obstruction, ...]

    __repr__ = short

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def answer(self) -> str:
        """The verdict without its reasons, in words."""
        found = {True: "patchable", False: "not patchable", None: "unknown"}[self.patchable]
        served = f", one static patch serves up to {self.capacity} token(s)" if self.routes and self.patchable else ""
        return f"{found}{served}"

    def lines(self, below: Callable[[Route], Iterable[str]] | None = None) -> Iterator[str]:
        """The page that `print` shows, line by line.

        Args:
            below: what stands below each route; by default its conditions.
        """
        yield self.answer
        if self.routes:
            yield "routes, the outermost parameter first:"
        for number, route in enumerate(self.routes, 1):
            yield f"  {number}. {_names(route)}   tokens: {route.capacity}   {route.source}"
            yield from (f"       {text}" for text in (below or _conditions)(route))
        yield from legend(c for route in self.routes for c in route.conditions)
        if self.obstructions:
            yield "why not:"
            yield from (f"  - {o.node}: {o.reason}" for o in self.obstructions)

    def html(self, more: Iterable[str] = ()) -> str:
        """The same for a notebook, with more notes below it."""
        rows = [(_names(r), r.capacity, "; ".join(_conditions(r)), r.source) for r in self.routes]
        notes = legend(c for route in self.routes for c in route.conditions)
        why = (f"why not: {o.node}: {o.reason}" for o in self.obstructions)
        return table(self.answer, ("route", "tokens", "conditions", "source"), rows, [*notes, *why, *more])

    def _repr_html_(self) -> str:
        return self.html()


def _names(route: Route) -> str:
    return " + ".join(route.parameters) or "nothing to do"


def _conditions(route: Route) -> list[str]:
    return list(dict.fromkeys(f"if {c.node}: {c}" if c.node else f"if {c}" for c in route.conditions))


def judge(graph: Graph, tokens: int | None = None) -> Verdict:
    """Whether a context can be absorbed into the free parameters of `graph`, exactly, for `tokens` tokens.

    Three answers. *Yes*: for every context, outside conditions that fail on a set of measure zero.
    *No*: for some context no values of the free parameters do. *Unknown* (None): neither was derived.
    """
    planner = Planner(graph)
    if planner.nothing_to_do and not planner.facts.undefined:
        return Verdict(True, Capacity(), (Route((), "the output does not depend on the context"),), ())
    found = routes_of(planner)
    routes = tuple(r for r in found if tokens is None or r.capacity.serves(tokens) is not False)
    sure = [r for r in routes if not r.conditional and (tokens is None or r.capacity.serves(tokens))]
    best = max(sure or routes, key=lambda r: r.capacity.estimate(), default=None)
    capacity = best.capacity if best else Capacity.of(0)
    if planner.facts.undefined:
        reason = "it has no epsilon, and reads what is zero for whole regions of contexts: the block has no value there"
        return Verdict(None, capacity, routes, tuple(Obstruction(n, reason) for n in planner.facts.undefined))
    if sure:
        return Verdict(True, capacity, routes, ())
    patchable = False if Refutation(graph).holds(tokens) else None
    return Verdict(patchable, capacity, routes, _reasons(planner, found, tokens))


def routes_of(planner: Planner) -> list[Route]:
    """The routes by one goal, the paper's construction, or, where no single goal does, the joined route."""
    routes = planner.single_routes()
    paper = planner.paper_route() if routes else planner.joined_route()
    if paper is not None and all(paper.steps != r.steps for r in routes):
        routes.append(paper)
    return routes


def _reasons(planner: Planner, found: list[Route], tokens: int | None) -> tuple[Obstruction, ...]:
    reasons = []
    for route in found:
        names = ", ".join(route.parameters)
        if tokens is not None and not route.capacity.serves(tokens):
            text = f"{names}: one static value serves {route.capacity} token(s), {tokens} are asked for"
            reasons.append(Obstruction(route.steps[-1].last.node, text))
            continue
        for condition in route.conditions:
            if condition.kind is Kind.OPEN:
                text = f"{names}: {condition.text}, which fails for whole regions of contexts"
                reasons.append(Obstruction(condition.node, text))
            elif condition.kind is Kind.SIZE:
                reasons.append(Obstruction(condition.node, f"{names}: needs {condition.text}; give the sizes"))
    noted = [*planner.obstructions, *planner.held_back()]
    mixing = [
        Obstruction(
            n.name, f"{n.name} ({n.op.kind}) looks at other tokens: what it brings in cannot be undone inside it"
        )
        for n in planner.graph.nodes
        if n.op.mixing and not found and not noted
    ]
    return tuple(dict.fromkeys([*reasons, *noted, *mixing]))
