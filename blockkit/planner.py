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
       scale takes what is left (the stable construction).

A parameter may move unless it is frozen, tied, read twice, or upstream of a mixing node. "No other
reader" keeps steering lawful: the operation's other arguments then cannot depend on what moves.

The block is patchable if restore(output). A *cut* is a node through which every path from the
context to the output leads; restoring any one cut restores the block, so each cut is a goal. Input
and output controllability (Definitions 3 and 4 of arXiv 2511.17864) and its Theorem 5 (restore the
inside, then steer the outside) are what these rules give on a residual block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .graph import Graph, Node
from .laws import Action, Condition, Kind, Law, parameter_capacity
from .ops import Add, Concat, LayerNorm, MatMul, Multiply, RMSNorm, Scale
from .reach import Reach
from .sizes import Capacity, Size

MOST_TERMS = 64  # longer sums are not followed term by term


@dataclass(frozen=True)
class Link:
    """One law on the way down from a goal: solve `node` for its argument at `position`."""

    node: str
    position: int
    law: Law


@dataclass(frozen=True)
class Step:
    """Solve for one parameter so that `goal` takes its contextual value.

    The target at the goal is pulled back along `path` to the parameter, the last link's argument.
    """

    parameter: str
    goal: str
    path: tuple[Link, ...]
    conditions: tuple[Condition, ...]
    capacity: Capacity
    numbers: Size
    exact: bool = True  # False: sets a direction only; a later step takes what is left

    @property
    def law(self) -> Law:
        return self.path[-1].law

    @property
    def is_matrix(self) -> bool:
        return self.law.action is Action.WEIGHT


@dataclass(frozen=True)
class Route:
    """Steps, in the order in which they are solved, that together restore the block."""

    steps: tuple[Step, ...]
    source: str

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(s.parameter for s in self.steps)

    @property
    def capacity(self) -> Capacity:
        total = Capacity()
        for step in self.steps:
            total = total & step.capacity
        return total

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(dict.fromkeys(c for s in self.steps for c in s.conditions))

    @property
    def numbers(self) -> Size:
        total = Size.of(0)
        for step in self.steps:
            total = total + step.numbers
        return total

    @property
    def conditional(self) -> bool:
        """Whether it hangs on a condition that fails in whole regions, or on sizes not yet known."""
        return any(c.kind is not Kind.GENERIC for c in self.conditions)


@dataclass(frozen=True)
class Obstruction:
    """Why a parameter, or whatever lies behind a node, does not serve."""

    node: str
    reason: str


class Planner:
    """The ladder, applied to one graph; every answer is derived from its operations' laws."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.obstructions: dict[tuple[str, str], Obstruction] = {}  # what the ladder ran into

    # -- what may move ---------------------------------------------------------------------------

    def immovable(self, name: str) -> str | None:
        """Why the parameter may not move; None if it may."""
        parameter = self.graph.parameter[name]
        if parameter.tied:
            return f"{name} is tied: it is also used outside this block, so moving it changes more than this block"
        if parameter.frozen:
            return f"{name} is frozen; freeing it would help"
        if name in self.graph.before_mixing:
            return f"{name} lies upstream of a mixing node, which no law inverts"
        if len(self.graph.uses.get(name, ())) > 1:
            return f"{name} is used twice in this block: one unknown with two equations"
        return None

    @cached_property
    def movable(self) -> frozenset[str]:
        return frozenset(p.name for p in self.graph.parameters if self.immovable(p.name) is None)

    @cached_property
    def steerable(self) -> frozenset[str]:
        """Nodes downstream of a movable parameter."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if any(a in self.movable or a in found for a in node.args):
                found.add(node.name)
        return frozenset(found)

    @cached_property
    def may_vanish(self) -> frozenset[str]:
        """Nodes that are zero, in some or all coordinates, for whole regions of contexts."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if node.op.may_vanish([a in found for a in node.args]):
                found.add(node.name)
        return frozenset(found)

    # -- goals -----------------------------------------------------------------------------------

    @cached_property
    def cuts(self) -> tuple[str, ...]:
        """The nodes any one of which restores the block, the output first.

        In topological order a node is a cut exactly if nothing before it is read after it, and no
        mixing node comes after it.
        """
        graph, cuts, furthest = self.graph, [], -1
        chain = [n for n in graph.nodes if n.name in graph.relevant and n.name in graph.contextual]
        last_mix = max((graph.index[n.name] for n in chain if n.op.mixing), default=-1)
        for node in chain:
            here = graph.index[node.name]
            if furthest <= here and last_mix <= here:
                cuts.append(node.name)
            furthest = max([furthest, *(graph.index[r] for r, _ in graph.uses.get(node.name, ()))])
        return tuple(reversed(cuts))

    # -- steer -----------------------------------------------------------------------------------

    def steer(self, goal: str) -> Iterator[Route]:
        """All ways to give `goal` its contextual value by one parameter (or the stable pair)."""
        pending: deque[tuple[str, tuple[Link, ...]]] = deque([(goal, ())])
        while pending:
            name, above = pending.popleft()
            node = self.graph.node[name]
            for position, arg in enumerate(node.args):
                law = self._open_law(node, position)
                if law is None:
                    continue
                path = (*above, Link(name, position, law))
                if arg in self.movable:
                    step = self._step(arg, goal, path)
                    yield Route((step,), _source_of(step))
                    yield from self._stable_pair(node, position, step, above)
                elif arg in self.graph.node and arg not in self.cuts and self._sole_reader(arg, node):
                    pending.append((arg, path))

    def _open_law(self, node: Node, position: int) -> Law | None:
        """The law of that argument if it reaches everything and something behind it may move."""
        arg = node.args[position]
        if arg not in self.movable and arg not in self.steerable:
            return None
        law = node.op.law(position, self.graph.arguments(node))
        if law is None:
            if not node.op.mixing:
                self._note(node.name, f"{node.op.kind} has no law for its argument {arg}")
            return None
        if law.reach is not Reach.ALL:
            self._note(node.name, f"{node.name} ({node.op.kind}) stops what lies behind it: {law.limit}")
            return None
        return law

    def _sole_reader(self, arg: str, reader: Node) -> bool:
        uses = self.graph.uses[arg]
        if len(uses) == 1:
            return True
        others = ", ".join(sorted({n for n, _ in uses} - {reader.name})) or reader.name
        self._note(arg, f"{arg} is also read by {others}, so steering it would move more than one term")
        return False

    def _stable_pair(self, node: Node, position: int, scale: Step, above: tuple[Link, ...]) -> Iterator[Route]:
        """Rule 3 of steer: direction by the matrix that feeds the norm, the remainder by the scale."""
        if not isinstance(node.op, Multiply):
            return
        arg = node.args[1 - position]
        norm = self.graph.node.get(arg)
        if node.op.offset and position == 0:
            return  # the offset stands beside the norm, not beside the scale
        if norm is None or not isinstance(norm.op, RMSNorm) or len(self.graph.uses[arg]) > 1:
            return
        fed = norm.args[0]
        if fed not in self.graph.node or fed in self.cuts or len(self.graph.uses[fed]) > 1:
            return
        signal = node.op.law(1 - position, self.graph.arguments(node))
        direction = norm.op.law(0, self.graph.arguments(norm))
        prefix = (*above, Link(node.name, 1 - position, signal), Link(arg, 0, direction))
        for inner in self.steer(fed):
            first = inner.steps[0]
            if len(inner.steps) > 1 or not first.is_matrix:
                continue
            turned = self._step(first.parameter, scale.goal, (*prefix, *first.path), exact=False)
            yield Route((turned, scale), "Theorem 1, stable construction")

    def _step(self, parameter: str, goal: str, path: tuple[Link, ...], exact: bool = True) -> Step:
        last = path[-1].law.action
        shape = self.graph.parameter[parameter].shape
        numbers = shape[0] + shape[1] if last is Action.WEIGHT else shape[0]
        capacity = parameter_capacity(last, shape) if exact else Capacity.of(1)
        if last is Action.WEIGHT and exact:
            capacity = capacity & self.spans[self.graph.node[path[-1].node].args[0]]
        return Step(parameter, goal, path, tuple(self._conditions(path)), capacity, numbers, exact)

    @cached_property
    def spans(self) -> dict[str, Capacity]:
        """The most dimensions that the values of a node can span over all tokens: an upper bound.

        A matrix that reads a bottleneck serves no more tokens than the bottleneck is wide.
        """
        graph = self.graph
        found = {graph.input: Capacity.of(graph.width)}
        for node in graph.nodes:
            width = graph.shapes[node.name][0]
            signals = [a for a in node.args if a not in graph.parameter]
            below, own = [found[a] for a in signals], Capacity.of(width)
            scaled = isinstance(node.op, Multiply) and (not node.op.offset or node.args[0] in signals)
            if isinstance(node.op, LayerNorm):
                own = Capacity.of(width - Size.of(1))
            elif isinstance(node.op, MatMul | Scale | RMSNorm) or (scaled and len(signals) == 1):
                own = own & below[0]
            elif isinstance(node.op, Add | Concat):
                total = [Size.of(1 if len(node.args) > len(signals) else 0)]
                for part in below:
                    total = [t + s for t in total for s in part.sizes][:MOST_TERMS]
                own = own & Capacity.of(*total)
            found[node.name] = own
        return found

    def _conditions(self, path: tuple[Link, ...]) -> Iterator[Condition]:
        """The conditions of the laws on a path; behind a known matrix, elementwise laws join its rank."""
        through: list[str] = []
        for link, below in zip(path, (*path[1:], None), strict=True):
            node, law = self.graph.node[link.node], link.law
            if law.action is Action.THROUGH:
                through.append(node.args[1])
            turns = below is not None and below.law.action is Action.DIRECTION
            for position in () if turns else law.nonzero:
                shown, kind = self._factor(node, position)
                if law.whole and through:
                    text = f"{' '.join(through)} diag({shown}) has full row rank"
                else:
                    text = f"{shown} is not zero {'where it has to change' if law.whole else 'as a vector'}"
                yield Condition(link.node, text, kind)
            if law.fact:
                yield Condition(link.node, f"{node.args[1]} {law.fact}", Kind.GENERIC)
            if law.sizes and law.sizes[0].at_most(law.sizes[1]) is None:
                yield Condition(link.node, f"{law.sizes[0]} <= {law.sizes[1]}", Kind.SIZE)
            if law.action is Action.INVERT:
                through.clear()

    def _factor(self, node: Node, position: int) -> tuple[str, Kind]:
        """The name of a factor as the law sees it, and how it can vanish."""
        arg = node.args[position]
        offset = node.op.offset if isinstance(node.op, Multiply) and position == 1 else 0.0
        return (f"{offset:g} + {arg}" if offset else arg), (
            Kind.OPEN if arg in self.may_vanish and not offset else Kind.GENERIC
        )

    # -- restore ---------------------------------------------------------------------------------

    @cached_property
    def _by_one_goal(self) -> tuple[Route, ...]:
        return tuple(route for cut in self.cuts for route in self.steer(cut))

    def single_routes(self) -> list[Route]:
        """Every route by one goal: steer each cut in turn. Linear in the size of the graph, and worked out once."""
        return list(self._by_one_goal)

    def joined_route(self) -> Route | None:
        """Restores the first cut, from the context on, that can be restored by several parameters together."""
        found = (self.restore(cut) for cut in reversed(self.cuts))
        return next((route for route in found if route is not None), None)

    def restore(self, goal: str, barred: frozenset[str] = frozenset(), inner: bool = False) -> Route | None:
        """A route that restores `goal` without passing `barred` nodes; None if there is none.

        With `inner`, rule 3 comes before rule 2 and only matrices move: the paper's restoration of
        every inner projection.
        """
        chosen: dict[str, Route | None] = {}
        wanted = self._upstream(goal, barred)
        for node in (n for n in self.graph.nodes if n.name in wanted):
            if node.name not in self.graph.contextual:
                chosen[node.name] = Route((), "")
            elif node.name in barred:
                chosen[node.name] = None
            else:
                joined = self._join(node, chosen)
                if joined is None or not inner:
                    own = (r for r in self.steer(node.name) if len(r.steps) == 1)
                    best = next((r for r in own if not inner or self._inner(r, node)), None)
                    joined = best or joined
                chosen[node.name] = joined
        return chosen[goal]

    def _inner(self, route: Route, node: Node) -> bool:
        """Whether the route moves the matrix of `node` itself, and that is not a mixer's own projection."""
        fed = self.graph.node.get(node.args[0])
        own = route.steps[0].is_matrix and route.steps[0].path[-1].node == node.name
        return own and not (fed is not None and fed.op.mixing)

    def _join(self, node: Node, chosen: dict[str, Route | None]) -> Route | None:
        if node.op.mixing:
            return None
        steps: dict[Step, None] = {}
        for arg in node.args:
            if arg in chosen:
                part = chosen[arg]
                if part is None:
                    return None
                steps.update(dict.fromkeys(part.steps))
        return Route(self._ordered(steps), "every argument restored")

    def _ordered(self, steps: dict[Step, None]) -> tuple[Step, ...]:
        return tuple(sorted(steps, key=lambda s: self.graph.index[s.goal]))

    def _upstream(self, goal: str, barred: frozenset[str]) -> frozenset[str]:
        seen, stack = {goal}, [goal]
        while stack:
            name = stack.pop()
            if name in barred or self.graph.node[name].op.mixing:
                continue
            for arg in self.graph.node[name].args:
                if arg in self.graph.node and arg not in seen:
                    seen.add(arg)
                    stack.append(arg)
        return frozenset(seen)

    def paper_route(self) -> Route | None:
        """Restore every inner projection, then steer the outermost parameter (Theorems 1 and 5)."""
        single = [r for r in self.single_routes() if len(r.steps) == 1]
        if not single:
            return None
        outermost = single[0].steps[0]
        barred = frozenset(
            arg
            for link in outermost.path[:-1]
            for position, arg in enumerate(self.graph.node[link.node].args)
            if position != link.position and arg in self.graph.contextual
        )
        last = self.graph.node[outermost.path[-1].node]
        steps: dict[Step, None] = {}
        complete = not barred  # whether the inner steps alone restore the goal
        for arg in last.args:
            if arg in self.graph.contextual and arg not in barred:
                inner = self.restore(arg, barred, inner=True)
                steps.update(dict.fromkeys(inner.steps if inner else ()))
                complete = complete and inner is not None
        if not steps:
            return single[0]
        if complete:
            return Route(self._ordered(steps), "Lemmas 6 and 7, input side alone")
        return Route((*self._ordered(steps), outermost), "Theorems 1 and 5")

    # -- why not ---------------------------------------------------------------------------------

    def _note(self, node: str, reason: str) -> None:
        self.obstructions.setdefault((node, reason), Obstruction(node, reason))

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
                    reason = self.immovable(step.parameter)
                    if reason and getattr(graph.parameter[step.parameter], flag):
                        found.append(Obstruction(step.path[-1].node, reason))
        for p in graph.parameters:
            if p.name not in self.movable and not (p.tied or p.frozen) and p.name in graph.uses:
                found.append(Obstruction(graph.uses[p.name][0][0], self.immovable(p.name) or ""))
        return list(dict.fromkeys(found))


_SOURCES = {
    Action.SHIFT: "Lemma 8",
    Action.WEIGHT: "Lemma 9",
    Action.DIVIDE: "Lemma 10",
}


def _source_of(step: Step) -> str:
    lemma = _SOURCES.get(step.law.action, step.law.source)
    return f"{lemma}, through {len(step.path) - 1} known operation(s)" if len(step.path) > 1 else lemma
