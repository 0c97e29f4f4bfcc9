"""What must hold of the values for a law on the way down to be exact, in words."""

from __future__ import annotations

from collections.abc import Iterator

from ..graph.graph import Node
from ..graph.laws import Action, Condition, Kind, Law
from ..graph.ops import Multiply, Vanish
from .analysis.facts import Facts
from .analysis.window import Window
from .route import Link

MOST_NAMED = 6  # matrices of one product that are named in a condition


def link_down(facts: Facts, node: Node, position: int, law: Law, above: Link | None, turns: bool = False) -> Link | str:
    """The link for one law under those above it, with its conditions; or why no target passes it.

    `turns`: a norm comes next, and takes a direction only, so that nothing is divided here.
    """
    always = [node.args[i] for i in law.nonzero if node.args[i] in facts.zero]
    if always and not turns:
        return f"{always[0]} is always zero"
    here = above.window if above is not None and above.window is not None else None
    here = here or Window.whole(facts.graph.shapes[node.name][0])
    below = here.below(facts.graph, node, position, law.action)
    if isinstance(below, str):
        return below
    through = above.through if above is not None and above.law.action is not Action.INVERT else ()
    if law.action is Action.THROUGH:
        through = (*through, node.args[1])[-MOST_NAMED:]
    conditions = list(_conditions(facts, node, law, through, turns))
    if law.action is Action.THROUGH and below.needed.at_most(below.room) is None:
        conditions.append(Condition(node.name, f"{below.needed} <= {below.room}", Kind.SIZE))
    return Link(node.name, position, law, above, tuple(conditions), through, below)


def _conditions(facts: Facts, node: Node, law: Law, through: tuple[str, ...], turns: bool) -> Iterator[Condition]:
    """The conditions of one law; behind a known matrix, element-wise laws join its rank."""
    for position in () if turns else law.nonzero:
        shown, kind = _factor(facts, node, position, law.whole)
        if law.whole and through and law.action is not Action.INVERT:  # which is inverted by itself
            text = f"{' '.join(through)} diag({shown}) has full row rank"
        else:
            text = f"{shown} is not zero {'where it has to change' if law.whole else 'as a vector'}"
        yield Condition(node.name, text, kind)
    if law.fact:
        yield Condition(node.name, f"{node.args[1]} {law.fact}", Kind.GENERIC)


def _factor(facts: Facts, node: Node, position: int, whole: bool) -> tuple[str, Kind]:
    """The name of a factor as the law sees it, and how it can vanish."""
    arg = node.args[position]
    offset = node.op.offset if isinstance(node.op, Multiply) and position == 1 else 0.0
    level = Vanish.NEVER if offset else facts.vanishing.get(arg, Vanish.NEVER)
    fails = level >= (Vanish.HOLES if whole else Vanish.ALL)
    return (f"{offset:g} + {arg}" if offset else arg), Kind.OPEN if fails else Kind.GENERIC
