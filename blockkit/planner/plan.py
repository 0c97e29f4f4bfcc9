"""Choosing a route, and showing it: the plan as numbered assignments with shapes, laws and sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..display import picture, short, table
from ..errors import BadInput, NotPatchable
from ..graph.graph import Graph
from ..graph.laws import Action, legend
from ..graph.ops import show_shape
from ..graph.sizes import Size
from .route import Route, Step
from .routes import Planner
from .verdict import routes_of

Strategy = Literal["paper", "minimal", "matrix", "stable", "joint"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class PlanStep:
    """One assignment of a plan, in words. `rank` counts rank-1 terms per token set; None for a vector."""

    parameter: str
    law: str
    formula: str
    rank: int | None
    conditions: tuple[str, ...]
    source: str
    shape: str


@dataclass(frozen=True)
class Plan:
    """Which parameters to solve for, in order, and what each solution is.

    Attributes:
        strategy: how the route was chosen.
        steps: the assignments in words.
        numbers_stored: how many numbers the factored patch of one block holds.
        route: the same, for the solver.
        blocks: the kinds of blocks that it is for, where a model was asked about.
        others: the plans of the model's other kinds of blocks, where these are planned differently.
    """

    strategy: str
    steps: tuple[PlanStep, ...]
    numbers_stored: Size
    route: Route
    graph: Graph
    blocks: tuple[str, ...] = ()
    others: tuple[Plan, ...] = ()

    __repr__ = short

    def __str__(self) -> str:
        parts = [plan._page(bool(self.others)) for plan in self.all]
        return "\n".join([*parts, *legend(c for plan in self.all for c in plan.route.conditions)])

    @property
    def all(self) -> tuple[Plan, ...]:
        """This plan and those of the model's other kinds of blocks."""
        return (self, *self.others)

    def title(self, several: bool = False) -> str:
        """The strategy, and what its plan costs; with the block's kind, where there are `several`."""
        where = f" of kind {'/'.join(self.blocks)}" if several else ""
        return f"strategy {self.strategy}: {self.numbers_stored} numbers stored for a block{where}"

    def _repr_html_(self) -> str:
        head = ("", "parameter", "shape", "rank", "assignment", "law", "conditions", "source")
        tables = []
        for plan in self.all:
            rows = [
                (n, s.parameter, s.shape, s.rank or "-", s.formula, s.law, "; ".join(s.conditions), s.source)
                for n, s in enumerate(plan.steps, 1)
            ]
            tables.append(table(plan.title(bool(self.others)), head, rows, legend(plan.route.conditions)))
        return "".join(tables)

    def _repr_svg_(self) -> str | None:
        return picture(self)

    def _page(self, several: bool) -> str:
        lines = [self.title(several)]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"  {number}. {step.formula}")
            rank = f", rank {step.rank}" if step.rank else ""
            lines.append(f"       {step.parameter} {step.shape}{rank}   law {step.law}   {step.source}")
            lines.extend(f"       if {c}" for c in step.conditions)
        return "\n".join(lines)


def make_plan(graph: Graph, strategy: str = "stable", tokens: int | None = None) -> Plan:
    """The plan that `strategy` prefers among the routes that serve `tokens` tokens.

    - `paper`: restore every inner projection, then steer the outermost parameter;
    - `minimal`: the fewest stored numbers;
    - `matrix`: matrices only, so that it can travel as a LoRA adapter;
    - `stable`: best conditioned: a bias, else a matrix, else a matrix for the direction and the
      norm's scale for the rest, else the scale alone;
    - `joint`: the largest capacity, for one static patch that serves many tokens.

    Raises:
        BadInput: an unknown strategy.
        NotPatchable: no route fits; the message says which strategies have one.
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"unknown strategy {strategy!r}; allowed are {', '.join(STRATEGIES)}")
    planner = Planner(graph)
    if planner.nothing_to_do:
        return _described(strategy, Route((), "nothing to do"), graph, tokens)
    offered = offers(planner, tokens)
    if strategy not in offered:
        raise NotPatchable(f"strategy {strategy!r} has no route{_for(tokens)}; {_instead(planner, offered, tokens)}")
    return _described(strategy, offered[strategy], graph, tokens)


def refusal(graph: Graph, tokens: int | None) -> str:
    """Why no strategy can serve so many tokens, or which ones can."""
    planner = Planner(graph)
    return f"there is no route{_for(tokens)}; {_instead(planner, offers(planner, tokens), tokens)}"


def _for(tokens: int | None) -> str:
    return f" for {tokens} tokens with one static patch" if tokens and tokens > 1 else ""


def _instead(planner: Planner, offered: Mapping[str, Route], tokens: int | None) -> str:
    if offered:
        return f"{', '.join(offered)} can do it"
    fewer = max(routes_of(planner), key=lambda r: r.capacity.estimate(), default=None)
    if tokens and fewer is not None:
        return f"{fewer.capacity} can be served at most (by {' + '.join(fewer.parameters)})"
    return "none of the strategies can do it, and `check` says why"


def offers(planner: Planner, tokens: int | None = None) -> dict[str, Route]:
    """Each strategy's route, for those that have one. Routes with only generic conditions go first."""
    if planner.nothing_to_do:
        return dict.fromkeys(STRATEGIES, Route((), "nothing to do"))
    routes = [r for r in routes_of(planner) if tokens is None or r.capacity.serves(tokens) is not False]
    routes.sort(key=lambda r: r.conditional)
    single = [r for r in routes if len(r.steps) == 1 or not r.steps[0].exact] or routes
    paper = planner.paper_route() or planner.joined_route()
    matrix = [r for r in routes if all(s.is_matrix for s in r.steps)]
    chosen: dict[str, Route] = {}

    def outward(route: Route) -> int:
        return -max(planner.graph.index[s.goal] for s in route.steps)

    if paper is not None and (tokens is None or paper.capacity.serves(tokens) is not False):
        chosen["paper"] = paper
    rules: dict[str, tuple[list[Route], Callable[[Route], object]]] = {
        "minimal": (single, lambda r: (r.conditional, r.numbers.estimate())),
        "matrix": (matrix, lambda r: (r.conditional, len(r.steps), r.numbers.estimate())),
        "stable": (
            single,
            lambda r: (r.conditional, _roughness(r) > 2, outward(r), _roughness(r), r.numbers.estimate()),
        ),
        "joint": (matrix, lambda r: (r.conditional, _roughness(r), -r.capacity.estimate())),
    }
    for name, (candidates, cost) in rules.items():
        if candidates:
            chosen[name] = min(candidates, key=cost)  # type: ignore[arg-type]
    return {s: chosen[s] for s in STRATEGIES if s in chosen}


def _roughness(route: Route) -> int:
    """How far rounding can be amplified: a bias not at all, a scale by 1/min|u|, a pseudo-inverse most."""
    if any(not s.exact or s.block is not None for s in route.steps):
        return 2
    actions = frozenset[Action]().union(*(s.last.actions for s in route.steps))
    if actions & {Action.THROUGH, Action.INVERT}:
        return 4
    if actions & {Action.DIVIDE, Action.JOINT, Action.JOINT_WEIGHT}:
        return 3
    return 1 if Action.WEIGHT in actions else 0


def _described(strategy: str, route: Route, graph: Graph, tokens: int | None) -> Plan:
    paired = any(not s.exact for s in route.steps)
    steps = []
    for step in route.steps:
        parameter = graph.parameter[step.parameter]
        steps.append(
            PlanStep(
                parameter=step.parameter,
                law=step.law.name,
                formula=f"{_solution(step, graph)}, {_aim(step, paired)}",
                rank=(tokens or 1) if step.is_matrix else None,
                conditions=tuple(str(c) for c in step.conditions),
                source=_step_source(step, graph),
                shape=show_shape(parameter.shape),
            )
        )
    return Plan(strategy, tuple(steps), route.numbers, route, graph)


def _aim(step: Step, paired: bool) -> str:
    if not step.exact:
        return f"which brings {step.goal} as near its contextual value as a direction can"
    if paired:
        return f"for what the direction left of {step.goal}"
    return f"so that {step.goal} takes its contextual value"


def _solution(step: Step, graph: Graph) -> str:
    """The assignment with the graph's own names; `n_C` is the contextual value of node n."""
    link = step.last
    last, action = graph.node[link.node], link.law.action
    if step.region:
        return f"{step.parameter} += L^+ ({step.goal}_C - {step.goal}), L the sum of its ways to {step.goal}"
    pulled = "" if link.depth == 1 else f"d_{last.name}"  # what the residual at the goal asks of this node
    change = f"{pulled}({step.goal}_C - {step.goal})"
    if action is Action.WEIGHT:
        z = last.args[0] if step.block is None else f"{last.args[0]}[most active expert]"
        return f"{step.parameter} += {change} {z}^T / |{z}|^2"
    if action is Action.DIVIDE:
        return f"{step.parameter} += {change} / {last.args[1 - link.position]}"
    if action is Action.INVERT:
        return f"{step.parameter} by {link.law.formula}, t = {last.name} + {change}"
    return f"{step.parameter} += {change}"


def _step_source(step: Step, graph: Graph) -> str:
    if not step.exact:
        return "Theorem 1, stable construction (closest unit-RMS direction)"
    if step.is_matrix and step.last.depth == 1 and step.goal != graph.output:
        return "Lemmas 6 and 7 (input side: restore the projection)"
    return step.law.source
