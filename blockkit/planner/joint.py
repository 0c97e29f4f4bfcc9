"""Rule 4 of steer: a parameter that reaches the goal in several ways, all of them linear.

p * u + p is p * (u + 1), and W a + W b is W (a + b): where a parameter is used twice, or a value on its way is read
twice, what it does to the goal is still linear as long as every operation on every way is linear in what moves.
The ways add up to one linear map of the parameter, and the residual at the goal is one joint equation for it.

Structure decides whether that map reaches everything. Each way is written as a product of factors (known matrices,
element-wise factors, numbers). Ways with equal products are added up, so that p - p is seen to cancel. If one of the
products that are left reaches everything by itself, their sum does, outside a set of measure zero.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..graph.graph import Node
from ..graph.laws import Condition, Kind, joint_law
from ..graph.ops import Add, MatMul, Multiply, Scale, Slice, Vanish
from ..graph.sizes import Capacity, Size
from .analysis.combinations import MOST_TERMS
from .analysis.facts import Facts
from .route import Link, Reasons, Step

STEPS_EACH = 32  # how many nodes a parameter's ways may hold, on average over all parameters


@dataclass(frozen=True)
class Product:
    """What one way multiplies a parameter by: known matrices and element-wise factors, from the parameter up.

    Attributes:
        factors: matrices and slices by name, in order; between two of them the element-wise factors, sorted.
        reads: for a matrix, the value it is applied to; empty for a vector.
        narrowest: the least width that the way passes.
        kind: how the element-wise factors can vanish.
    """

    factors: tuple[tuple[str, ...], ...] = ((),)
    reads: str = ""
    narrowest: Capacity = field(default=Capacity(), compare=False)
    kind: Kind = field(default=Kind.GENERIC, compare=False)


Ways = dict[Product, float]  # each product with the number it is multiplied by


class Joint:
    """The joint equations of one graph."""

    def __init__(self, facts: Facts, reasons: Reasons) -> None:
        self.facts, self.graph, self.reasons = facts, facts.graph, reasons

    def steps(self, served: set[str]) -> Iterator[Step]:
        """A step for each movable parameter, not `served` already, that reaches a cut in linear ways only."""
        budget = STEPS_EACH * (len(self.graph.nodes) + 1)
        for parameter in self.graph.parameters:
            name = parameter.name
            if name not in self.facts.movable or name in served or name not in self.graph.uses:
                continue
            if budget <= 0:
                self.reasons.add(self.graph.uses[name][0][0], f"{name}: the graph is too entangled to follow its ways")
                continue
            sweep = _Sweep(self, name)
            step = sweep.step()
            budget -= len(sweep.ways)
            if step is not None:
                yield step


class _Sweep:
    """One parameter's ways, followed from it upwards until all of them have met in a cut."""

    def __init__(self, joint: Joint, parameter: str) -> None:
        self.facts, self.graph, self.reasons = joint.facts, joint.graph, joint.reasons
        self.parameter = parameter
        self.ways: dict[str, Ways] = {}
        self.queue: list[int] = []
        self.splits = False  # whether there is more than one way

    def step(self) -> Step | None:
        """The step that restores the cut in which all ways meet; None if they are not linear, or cancel out."""
        self._readers(self.parameter)
        while self.queue:
            node = self.graph.nodes[heapq.heappop(self.queue)]
            while self.queue and self.graph.nodes[self.queue[0]].name == node.name:
                heapq.heappop(self.queue)
            found = self._through(node)
            if found is None:
                if self.splits:
                    what = f"{node.name} ({node.op.kind}) is not linear in them: one unknown with several equations"
                    self.reasons.add(node.name, f"{self.parameter} is used in several ways, and {what}")
                return None
            self.ways[node.name] = found
            if not self.queue and node.name in self.facts.is_cut:
                return self._meeting(node.name, found)
            self._readers(node.name)
        return None

    def _readers(self, name: str) -> None:
        self.splits = self.splits or len(self.graph.uses.get(name, ())) > 1
        for reader, _ in self.graph.uses.get(name, ()):
            heapq.heappush(self.queue, self.graph.index[reader])

    def _through(self, node: Node) -> Ways | None:
        """The ways of a node's result; None if it is not linear in what moves."""
        moving = [i for i, a in enumerate(node.args) if a == self.parameter or a in self.ways]
        if not isinstance(node.op, Add | Multiply | MatMul | Scale | Slice):
            return None
        if len(moving) > 1 and not isinstance(node.op, Add):
            return None
        total: Ways = {}
        for position in moving:
            arg = node.args[position]
            start = {Product(): 1.0} if arg == self.parameter else self.ways[arg]
            for product, times in start.items():
                grown, number = self._grown(node, position, product)
                total[grown] = total.get(grown, 0.0) + number * times
        total = {product: times for product, times in total.items() if times != 0}
        return total if len(total) <= MOST_TERMS else None

    def _grown(self, node: Node, position: int, product: Product) -> tuple[Product, float]:
        """A way taken through one more node, and the number that it is multiplied by there."""
        factors, narrowest, kind = product.factors, product.narrowest, product.kind
        arg = node.args[1 - position : 2 - position]
        if (
            arg
            and arg[0] in self.facts.zero
            and not (isinstance(node.op, Multiply) and node.op.offset and not position)
        ):
            return product, 0.0
        match node.op:
            case Scale(alpha=alpha):
                return product, alpha
            case Multiply(offset=offset):
                shifted = offset != 0 and position == 0
                named, times = (f"{offset:g} + {arg[0]}", 1.0) if shifted else self._multiple(arg[0])
                factors = (*factors[:-1], tuple(sorted((*factors[-1], named))))
                if self.facts.vanishing.get(arg[0], Vanish.NEVER) and not shifted:
                    kind = Kind.OPEN
                return Product(factors, product.reads, narrowest, kind), times
            case MatMul() if position == 1:
                reads, times = self._multiple(arg[0])
                return Product(reads=reads, kind=self._zero(arg[0])), times
            case MatMul():
                narrowest = narrowest & Capacity.of(*self.graph.parameter[arg[0]].shape)
                factors = (*factors, (arg[0],), ())
            case Slice(start=start, stop=stop):
                narrowest = narrowest & Capacity.of(stop - start)
                factors = (*factors, (f"[{start}:{stop}]",), ())
        return Product(factors, product.reads, narrowest, kind), 1.0

    def _multiple(self, name: str) -> tuple[str, float]:
        """The value of which another is a multiple, and the number, so that p u - p u is seen to cancel."""
        form = self.facts.forms.found.get(name)
        return next(iter(form.items())) if form is not None and len(form) == 1 else (name, 1.0)

    def _zero(self, name: str) -> Kind:
        return Kind.OPEN if self.facts.vanishing.get(name) is Vanish.ALL else Kind.GENERIC

    def _meeting(self, goal: str, ways: Ways) -> Step | None:
        asked = self.graph.shapes[goal][0]
        room = {p: [asked.at_most(width) for width in p.narrowest.sizes] for p in ways}
        reaching = [p for p in ways if False not in room[p]]
        if not reaching:
            what = "cancel out" if not ways else "reach only part of what is asked for"
            self.reasons.add(goal, f"{self.parameter} is used in several ways to {goal}, and they {what}")
            return None
        best = min(reaching, key=lambda p: (p.kind is Kind.OPEN, None in room[p]))
        matrix = bool(best.reads)
        first, position = self.graph.uses[self.parameter][0]
        conditions = [Condition(goal, f"what {self.parameter} is multiplied by on its {len(ways)} way(s) to {goal} "
                                "adds up to full row rank", best.kind)]  # fmt: skip
        if None in room[best]:
            conditions.append(Condition(goal, f"{asked} <= {best.narrowest}", Kind.SIZE))
        link = Link(first, position, joint_law(matrix), None, tuple(conditions))
        capacity, numbers = self._capacity(ways, matrix), self._numbers()
        return Step(self.parameter, goal, link, capacity, numbers, region=tuple(self.ways))

    def _capacity(self, ways: Ways, matrix: bool) -> Capacity:
        """As many tokens as the values that the matrix reads can span together; one for a vector."""
        if not matrix:
            return Capacity.of(1)
        d_in = self.graph.parameter[self.parameter].shape[1]
        return Capacity.of(d_in) & self.facts.spans.together(p.reads for p in ways)

    def _numbers(self) -> Size:
        shape = self.graph.parameter[self.parameter].shape
        return shape[0] if len(shape) == 1 else shape[0] + shape[1]
