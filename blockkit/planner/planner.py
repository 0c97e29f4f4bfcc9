"""The planner: which parameters can stand in for the context, and why, or why not.

Compare two runs of a block on the same token: the *contextual* run sees the whole context, the
*reduced* run does not. Only mixing nodes can make the two differ. Two abilities of a node n are
composed over the graph:

    restore(n)   make n's reduced value equal its contextual value;
    steer(n)     make n's reduced value equal any given target.

The ladder for restore(n), first rule that fires:

    1. n does not depend on the context: there is nothing to do.
    2. steer(n), with the contextual value as the target.
    3. n is not a mixing node and every argument of n can be restored.

The ladder for steer(n), over the arguments of n's operation:

    1. the argument is a parameter that may move, and the operation's law for it reaches everything;
    2. the argument is a node with no other reader, the law reaches everything, and it can be steered;
    3. a norm under an element-wise scale: the matrix that feeds the norm takes the direction, the
       scale takes what is left (the stable construction);
    4. a parameter that reaches n in several ways, all of them linear: one joint equation
       (`blockkit.planner.joint`).

A parameter may move unless it is frozen, tied, or upstream of a mixing node. "No other reader" keeps
steering lawful: the operation's other arguments then cannot depend on what moves.

The block is patchable if restore(output). A *cut* is a node through which every path from the
context to the output leads; restoring any one cut restores the block, so each cut is a goal. Input
and output controllability (Definitions 3 and 4 of arXiv 2511.17864) and its Theorem 5 (restore the
inside, then steer the outside) are what these rules give on a residual block.

Every rule looks at a node once: the whole takes time in proportion to the size of the graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..graph.graph import Graph, Node
from ..graph.laws import Action, Kind, parameter_capacity
from ..graph.ops import Multiply, RMSNorm
from ..graph.reach import Reach
from ..graph.sizes import Capacity, Size
from .analysis.facts import Facts
from .analysis.window import Window
from .conditions import link_down
from .joint import Joint
from .route import Link, Obstruction, Reasons, Route, Step


class Planner:
    """The ladder, applied to one graph; every answer is derived from its operations' laws."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.facts = Facts(graph)
        self.obstructions = Reasons()  # what the ladder ran into

    @property
    def nothing_to_do(self) -> bool:
        """Whether the output is the same whatever the context."""
        return self.graph.output not in self.facts.contextual

    # -- steer -----------------------------------------------------------------------------------

    def steer(self, goal: str, beyond: set[str] | None = None) -> Iterator[Route]:
        """Rules 1 to 3: all ways to give `goal` its contextual value along a single way down.

        They end at cuts, which are goals of their own, unless a set for the cuts `beyond` is given: a goal that
        asks for less than a cut behind it (a slice does) may be had where that cut may not.
        """
        pending: deque[tuple[str, Link | None]] = deque([(goal, None)])
        while pending:
            name, above = pending.popleft()
            if beyond is not None:
                beyond.add(name)
            node = self.graph.node[name]
            for position, arg in enumerate(node.args):
                link = self._open(node, position, above)
                if link is None:
                    continue
                if arg in self.facts.movable:
                    yield from self._end(node, link, goal)
                elif self._passes(arg, node, beyond is not None):
                    pending.append((arg, link))

    def _open(self, node: Node, position: int, above: Link | None = None) -> Link | None:
        """The law of that argument if it reaches everything and something behind it may move."""
        arg = node.args[position]
        if arg not in self.facts.movable and arg not in self.facts.steerable:
            return None
        law = node.op.law(position, self.graph.arguments(node))
        if law is None:
            if not node.op.mixing:
                self.obstructions.add(node.name, f"{node.op.kind} has no law for its argument {arg}")
            return None
        if law.reach is not Reach.ALL:
            self.obstructions.add(node.name, f"{node.name} ({node.op.kind}) stops what lies behind it: {law.limit}")
            return None
        link = link_down(self.facts, node, position, law, above)
        if isinstance(link, str):
            self.obstructions.add(node.name, f"{node.name} ({node.op.kind}) stops what lies behind it: {link}")
            return None
        return link

    def _end(self, node: Node, link: Link, goal: str) -> Iterator[Route]:
        """The routes that end at the parameter which `link` solves for."""
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

    def _passes(self, arg: str, reader: Node, beyond: bool) -> bool:
        """Rule 2's condition on the value that would be steered."""
        if arg not in self.graph.node or (arg in self.facts.is_cut and not beyond):
            return False
        readers = {n for n, _ in self.graph.uses[arg]}
        if len(self.graph.uses[arg]) == 1:
            return True
        others = ", ".join(sorted(readers - {reader.name})[:3]) or reader.name
        self.obstructions.add(arg, f"{arg} is also read by {others}, so steering it would move more than one term")
        return False

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
        for inner in self.steer(fed):
            first = inner.steps[0]
            if len(inner.steps) > 1 or not first.is_matrix or first.block is not None:
                continue
            last = self._extended(turned, first.path)
            if last is not None:
                yield Route((self._step(last, scale.goal, exact=False), scale), "Theorem 1, stable construction")

    def _extended(self, above: Link, path: tuple[Link, ...]) -> Link | None:
        """The links of `path` again, under another one; None if less passes there."""
        for below in path:
            link = link_down(self.facts, self.graph.node[below.node], below.position, below.law, above)
            if isinstance(link, str):
                return None
            above = link
        return above

    def _step(self, link: Link, goal: str, exact: bool = True) -> Step:
        node = self.graph.node[link.node]
        parameter = node.args[link.position]
        shape, action = self.graph.parameter[parameter].shape, link.law.action
        numbers = shape[0] + shape[1] if action is Action.WEIGHT else shape[0]
        capacity = parameter_capacity(action, shape) if exact else Capacity.of(1)
        if action is Action.WEIGHT and exact:
            capacity = capacity & self.facts.spans[node.args[0]]
        return Step(parameter, goal, link, capacity, numbers, exact)

    # -- goals -----------------------------------------------------------------------------------

    @cached_property
    def _by_one_goal(self) -> tuple[Route, ...]:
        along_one_way = [route for cut in self.facts.cuts for route in self.steer(cut)]
        served = {p for route in along_one_way for p in route.parameters}
        beyond: set[str] = set()
        for cut in self.facts.cuts if served < self.facts.movable else ():
            if cut not in beyond:
                further = [r for r in self.steer(cut, beyond) if served.isdisjoint(r.parameters)]
                along_one_way += further
                served.update(p for r in further for p in r.parameters)
        joint = Joint(self.facts, self.obstructions)
        return (*along_one_way, *(Route((s,), "one joint equation") for s in joint.steps(served)))

    def single_routes(self) -> list[Route]:
        """Every route by one goal: steer each cut in turn. Linear in the size of the graph, and worked out once."""
        return list(self._by_one_goal)

    # -- restore ---------------------------------------------------------------------------------

    def joined_route(self) -> Route | None:
        """Restores the first cut, from the context on, that can be restored by several parameters together."""
        restored = self._restorable()
        first = next((cut for cut in reversed(self.facts.cuts) if restored.get(cut) is not None), None)
        if first is None:
            return None
        return Route(self._collected(first, restored), "every argument restored")

    def _restorable(self, barred: frozenset[str] = frozenset(), inner: bool = False) -> dict[str, Choice | None]:
        """For every node, how the ladder restores it; None where it does not.

        `barred` nodes are not to be passed. With `inner`, rule 3 comes before rule 2 and only matrices move:
        the paper's restoration of every inner projection. A way that hangs on an open condition comes last.
        """
        found: dict[str, Choice | None] = {}
        for node in self.graph.nodes:
            if node.name not in self.facts.contextual:
                found[node.name] = Choice()
                continue
            parts = [found.get(a, Choice()) for a in self.facts.reads(node)]
            ways = []
            if not node.op.mixing and None not in parts:
                ways.append(Choice(open=any(p.open for p in parts if p is not None)))
            own = self._own_matrix(node) if inner else self._nearest.get(node.name)
            if own is not None:
                ways.insert(len(ways) if inner else 0, Choice(own.link, own.open))
            found[node.name] = None if node.name in barred else min(ways, key=lambda w: w.open, default=None)
        return found

    def _own_matrix(self, node: Node) -> Way | None:
        """The law for the node's own movable matrix, unless it is a mixer's own projection."""
        if len(node.args) != 2 or node.args[1] not in self.facts.movable or len(self.graph.uses[node.args[1]]) > 1:
            return None
        fed = self.graph.node.get(node.args[0])
        link = self._open(node, 1)
        if link is None or link.law.action is not Action.WEIGHT or (fed is not None and fed.op.mixing):
            return None
        return Way(link, Kind.OPEN in link.kinds)

    @cached_property
    def _nearest(self) -> dict[str, Way]:
        """For every node that can be steered along a single way, the first link of such a way."""
        found: dict[str, Way] = {}
        for node in self.graph.nodes:
            ways = []
            for position, arg in enumerate(node.args):
                link = self._open(node, position)
                if link is None or len(self.graph.uses.get(arg, ())) != 1:
                    continue
                if arg in self.facts.movable or arg in found:
                    ways.append(Way(link, Kind.OPEN in link.kinds or (arg in found and found[arg].open)))
            if ways:
                found[node.name] = min(ways, key=lambda w: w.open)
        return found

    def _collected(self, goal: str, chosen: dict[str, Choice | None]) -> tuple[Step, ...]:
        """The steps behind a node's restoration, in the order in which they are solved."""
        steps: dict[Step, None] = {}
        seen, stack = {goal}, [goal]
        while stack:
            name = stack.pop()
            choice = chosen.get(name)
            if choice is None or name not in self.facts.contextual:
                continue
            if choice.own is not None:
                steps.setdefault(self._followed(name, choice.own))
                continue
            for arg in self.facts.reads(self.graph.node[name]):
                if arg in self.graph.node and arg not in seen:
                    seen.add(arg)
                    stack.append(arg)
        return tuple(sorted(steps, key=lambda s: self.graph.index[s.goal]))

    def _followed(self, goal: str, link: Link) -> Step:
        """The step that a way of `_nearest` describes, from its goal down to the parameter."""
        node = self.graph.node[goal]
        ways = [link]
        while (arg := node.args[ways[-1].position]) not in self.graph.parameter:
            node = self.graph.node[arg]
            ways.append(self._nearest[arg].link)
        last = self._extended(link, tuple(ways[1:]))
        return self._step(last or link, goal)

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
        restored = self._restorable(barred, inner=True)
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


@dataclass(frozen=True)
class Way:
    """The first link of a way down by which a node is steered, and whether the way hangs on an open condition."""

    link: Link
    open: bool


@dataclass(frozen=True)
class Choice:
    """How a node is restored: by a way of its own (rule 2), or by nothing but its arguments (rules 1 and 3)."""

    own: Link | None = None
    open: bool = False


_SOURCES = {
    Action.SHIFT: "Lemma 8",
    Action.WEIGHT: "Lemma 9",
    Action.DIVIDE: "Lemma 10",
}


def _source_of(step: Step) -> str:
    lemma = _SOURCES.get(step.law.action, step.law.source)
    return f"{lemma}, through {step.last.depth - 1} known operation(s)" if step.last.depth > 1 else lemma
