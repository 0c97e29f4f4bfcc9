"""Routes: which parameters, solved for in which order, restore a block.

The rule (`blockkit.planner.rule`) decides what can be restored and steered; a route is one derivation of it. A *cut* is
a node through which every path from the context to the output leads; restoring any one cut restores the block, so each
cut is a goal. There are three sorts of routes:

    by one goal    steer a cut: along a single way, by the stable construction, or by one joint equation;
    the paper's    restore every inner projection, then steer the outermost parameter (Theorems 1 and 5);
    joined         restore the first cut that no single parameter restores, by several together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from ..graph.graph import Graph, Node
from ..graph.laws import Action, parameter_capacity
from ..graph.ops import Multiply, RMSNorm
from ..graph.sizes import Capacity, Size
from .analysis.window import Window
from .conditions import link_down
from .joint import Joint
from .route import Link, Obstruction, Route, Step
from .rule import Restored, Rule


class Planner:
    """The routes of one graph; every one is derived from its operations' laws."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rule = Rule(graph)
        self.facts, self.obstructions = self.rule.facts, self.rule.obstructions

    @property
    def nothing_to_do(self) -> bool:
        """Whether the output is the same whatever the context."""
        return self.graph.output not in self.facts.contextual

    # -- by one goal -----------------------------------------------------------------------------

    def single_routes(self) -> list[Route]:
        """Every route by one goal: steer each cut in turn. Linear in the size of the graph, and worked out once."""
        return list(self._by_one_goal)

    @cached_property
    def _by_one_goal(self) -> tuple[Route, ...]:
        along_one_way = [route for cut in self.facts.cuts for route in self.routes_to(cut)]
        served = {p for route in along_one_way for p in route.parameters}
        beyond: set[str] = set()
        for cut in self.facts.cuts if served < self.facts.movable else ():
            if cut not in beyond:
                further = [r for r in self.routes_to(cut, beyond) if served.isdisjoint(r.parameters)]
                along_one_way += further
                served.update(p for r in further for p in r.parameters)
        joint = Joint(self.facts, self.obstructions)
        return (*along_one_way, *(Route((s,), "one joint equation") for s in joint.steps(served)))

    def routes_to(self, goal: str, beyond: set[str] | None = None) -> Iterator[Route]:
        """All ways to give `goal` its contextual value along a single way down; see `Rule.steer`."""
        for link in self.rule.steer(goal, beyond):
            yield from self._ending(link, goal)

    def _ending(self, link: Link, goal: str) -> Iterator[Route]:
        """The routes that end at the parameter which `link` solves for."""
        node = self.graph.node[link.node]
        parameter = node.args[link.position]
        if len(self.graph.uses[parameter]) > 1:
            return  # rule 4 may serve it
        step = self._step(link, goal)
        yield Route((step,), _source_of(step))
        if block := self._one_expert(node, link):
            numbers = self.graph.parameter[parameter].shape[0] + block
            one = replace(step, block=block, capacity=Capacity.of(1), numbers=numbers)  # which one hangs on the token
            yield Route((one,), "gated sum: the most active expert alone")
        yield from self._stable_pair(node, link, step)

    def _one_expert(self, node: Node, link: Link) -> Size | None:
        """The width of one expert, where the matrix that `link` solves for reads stacked experts."""
        return self.facts.experts.get(node.args[0]) if link.law.action is Action.WEIGHT else None

    def _stable_pair(self, node: Node, link: Link, scale: Step) -> Iterator[Route]:
        """Rule 3 of steer: direction by the matrix that feeds the norm, the remainder by the scale."""
        if not isinstance(node.op, Multiply) or (node.op.offset and link.position == 0):
            return  # an offset must stand beside the scale, not beside the norm
        arg = node.args[1 - link.position]
        norm = self.graph.node.get(arg)
        if norm is None or not isinstance(norm.op, RMSNorm) or len(self.graph.uses[arg]) > 1:
            return
        fed = norm.args[0]
        if fed not in self.graph.node or fed in self.facts.is_cut or len(self.graph.uses[fed]) > 1:
            return
        signal = node.op.law(1 - link.position, self.graph.arguments(node))
        direction = norm.op.law(0, self.graph.arguments(norm))
        scaled = link_down(self.facts, node, 1 - link.position, signal, link.above, turns=True)
        turned = scaled if isinstance(scaled, str) else link_down(self.facts, norm, 0, direction, scaled)
        if isinstance(turned, str) or turned.window != Window.whole(self.graph.shapes[arg][0]):
            return
        for inner in self.routes_to(fed):
            first = inner.steps[0]
            if len(inner.steps) > 1 or not first.is_matrix or first.block is not None:
                continue
            last = self.rule.extended(turned, first.path)
            if last is not None:
                yield Route((self._step(last, scale.goal, exact=False), scale), "Theorem 1, stable construction")

    def _step(self, link: Link, goal: str, exact: bool = True) -> Step:
        node = self.graph.node[link.node]
        parameter = node.args[link.position]
        shape, action = self.graph.parameter[parameter].shape, link.law.action
        numbers = shape[0] + shape[1] if action is Action.WEIGHT else shape[0]
        capacity = parameter_capacity(action, shape) if exact else Capacity.of(1)
        if action is Action.WEIGHT and exact:
            capacity = capacity & self.facts.spans[node.args[0]]
        return Step(parameter, goal, link, capacity, numbers, exact)

    # -- by several parameters -------------------------------------------------------------------

    def paper_route(self) -> Route | None:
        """Restore every inner projection, then steer the outermost parameter (Theorems 1 and 5)."""
        single = [r for r in self.single_routes() if len(r.steps) == 1 and not r.steps[0].region]
        if not single:
            return None
        outermost = single[0].steps[0]
        barred = frozenset(
            arg
            for link in outermost.path[:-1]
            for position, arg in enumerate(self.graph.node[link.node].args)
            if position != link.position and arg in self.graph.contextual
        )
        restored = self.rule.restore(self.rule.by_arguments, self.rule.by_own_matrix, barred=barred)
        steps: dict[Step, None] = {}
        complete = not barred  # whether the inner steps alone restore the goal
        for arg in self.graph.node[outermost.last.node].args:
            if arg in self.graph.contextual and arg not in barred:
                if restored[arg] is None:
                    complete = False
                else:
                    steps.update(dict.fromkeys(self._collected(arg, restored)))
        ordered = tuple(sorted(steps, key=lambda s: self.graph.index[s.goal]))
        if not steps:
            return single[0]
        if complete:
            return Route(ordered, "Lemmas 6 and 7, input side alone")
        return Route((*ordered, outermost), "Theorems 1 and 5")

    def joined_route(self) -> Route | None:
        """Restores the first cut, from the context on, that can be restored by several parameters together."""
        restored = self.rule.restore(self.rule.by_steering, self.rule.by_arguments)
        first = next((cut for cut in reversed(self.facts.cuts) if restored.get(cut) is not None), None)
        if first is None:
            return None
        return Route(self._collected(first, restored), "every argument restored")

    def _collected(self, goal: str, chosen: Restored) -> tuple[Step, ...]:
        """The steps behind a node's restoration, in the order in which they are solved."""
        steps: dict[Step, None] = {}
        seen, stack = {goal}, [goal]
        while stack:
            name = stack.pop()
            choice = chosen.get(name)
            if choice is None or name not in self.facts.contextual:
                continue
            if choice.link is not None:
                steps.setdefault(self._step(self.rule.followed(choice.link), name))
                continue
            for arg in self.facts.reads(self.graph.node[name]):
                if arg in self.graph.node and arg not in seen:
                    seen.add(arg)
                    stack.append(arg)
        return tuple(sorted(steps, key=lambda s: self.graph.index[s.goal]))

    # -- why not ---------------------------------------------------------------------------------

    def held_back(self) -> list[Obstruction]:
        """The parameters that would serve if only they were free to move, and why they are not."""
        graph, found = self.graph, []
        for flag in ("tied", "frozen"):
            if not any(getattr(p, flag) for p in graph.parameters):
                continue
            thawed = flag == "frozen"
            freed = tuple(replace(p, tied=False, frozen=p.frozen and not thawed) for p in graph.parameters)
            for route in Planner(replace(graph, parameters=freed)).single_routes():
                for step in route.steps:
                    reason = self.facts.immovable(step.parameter)
                    if reason and getattr(graph.parameter[step.parameter], flag):
                        found.append(Obstruction(step.last.node, reason))
        for p in graph.parameters:
            if p.name not in self.facts.movable and not (p.tied or p.frozen) and p.name in graph.uses:
                found.append(Obstruction(graph.uses[p.name][0][0], self.facts.immovable(p.name) or ""))
        return list(dict.fromkeys(found))


_SOURCES = {
    Action.SHIFT: "Lemma 8",
    Action.WEIGHT: "Lemma 9",
    Action.DIVIDE: "Lemma 10",
}


def _source_of(step: Step) -> str:
    lemma = _SOURCES.get(step.law.action, step.law.source)
    return f"{lemma}, through {step.last.depth - 1} known operation(s)" if step.last.depth > 1 else lemma
