"""What a planner finds: steps that solve for parameters, routes made of steps, and the reasons against one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

from ..graph.laws import Action, Condition, Kind, Law
from ..graph.sizes import Capacity, Size
from .analysis.window import Window

MOST_SHOWN = 40  # conditions of one step that are listed


@dataclass(frozen=True, eq=False)
class Link:
    """One law on the way down from a goal: solve `node` for its argument at `position`.

    Links know the one above them, so that the many ways down from one goal share what they have in common.

    Attributes:
        conditions: what this law asks for.
        through: the known matrices passed since the goal, as far as they are inverted together with this law.
        window: which coordinates of the argument the target reaches; None for all of them.
        actions, kinds, depth: of this link and all above it.
    """

    node: str
    position: int
    law: Law
    above: Link | None = None
    conditions: tuple[Condition, ...] = ()
    through: tuple[str, ...] = ()
    window: Window | None = None
    actions: frozenset[Action] = field(init=False)
    kinds: frozenset[Kind] = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        above = self.above
        for name, value in (
            ("actions", _with(above.actions if above else frozenset(), (self.law.action,))),
            ("kinds", _with(above.kinds if above else frozenset(), (c.kind for c in self.conditions))),
            ("depth", (above.depth if above else 0) + 1),
        ):
            object.__setattr__(self, name, value)

    def path(self) -> tuple[Link, ...]:
        """From the goal's link down to this one."""
        return tuple(reversed(list(self.upward())))

    def upward(self) -> Iterator[Link]:
        link: Link | None = self
        while link is not None:
            yield link
            link = link.above


def _with(found: frozenset[Any], more: Iterable[Any]) -> frozenset[Any]:
    """The union; the set itself where there is nothing new, so that links share it."""
    new = [m for m in more if m not in found]
    return found | frozenset(new) if new else found


@dataclass(frozen=True)
class Step:
    """Solve for one parameter so that `goal` takes its contextual value.

    The target at the goal is pulled back along `path` to the parameter, the last link's argument.

    Attributes:
        last: the link that ends at the parameter.
        capacity: how many tokens one static value serves.
        numbers: how many the factored change holds.
        exact: False for a step that sets a direction only; a later step takes what is left.
        block: for stacked experts, the width of one: only the columns of the most active expert are solved for.
        region: for a parameter with several ways to the goal, the nodes on those ways, in order; else empty.
    """

    parameter: str
    goal: str
    last: Link = field(compare=False)
    capacity: Capacity = field(compare=False)
    numbers: Size = field(compare=False)
    exact: bool = True
    block: Size | None = None
    region: tuple[str, ...] = ()

    @cached_property
    def path(self) -> tuple[Link, ...]:
        return self.last.path()

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """What must hold of the values: generic, open, or of sizes; of a very long way down, those nearest its end."""
        listed = chain.from_iterable(reversed(link.conditions) for link in self.last.upward())
        return tuple(reversed(list(dict.fromkeys(islice(listed, MOST_SHOWN)))))

    @property
    def conditional(self) -> bool:
        """Whether it hangs on a condition that fails in whole regions, or on sizes not yet known."""
        return not self.last.kinds <= {Kind.GENERIC}

    @property
    def law(self) -> Law:
        return self.last.law

    @property
    def is_matrix(self) -> bool:
        return self.law.action in (Action.WEIGHT, Action.JOINT_WEIGHT)


@dataclass(frozen=True)
class Route:
    """Steps, in the order in which they are solved, that together restore the block."""

    steps: tuple[Step, ...]
    source: str

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(s.parameter for s in self.steps)

    @cached_property
    def capacity(self) -> Capacity:
        total = Capacity()
        for step in self.steps:
            total = total & step.capacity
        return total

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(dict.fromkeys(c for s in self.steps for c in s.conditions))

    @cached_property
    def numbers(self) -> Size:
        total = Size.of(0)
        for step in self.steps:
            total = total + step.numbers
        return total

    @cached_property
    def conditional(self) -> bool:
        """Whether it hangs on a condition that fails in whole regions, or on sizes not yet known."""
        return any(s.conditional for s in self.steps)


@dataclass(frozen=True)
class Obstruction:
    """Why a parameter, or whatever lies behind a node, does not serve."""

    node: str
    reason: str


@dataclass
class Reasons:
    """What a planner ran into, each once, in the order in which it did."""

    found: dict[Obstruction, None] = field(default_factory=dict)

    def add(self, node: str, reason: str) -> None:
        self.found.setdefault(Obstruction(node, reason))

    def __iter__(self) -> Iterator[Obstruction]:
        return iter(self.found)
