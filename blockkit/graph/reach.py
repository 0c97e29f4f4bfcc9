"""How much of its space a value can be made to fill: a small lattice, and how operations move in it.

The planner uses it twice, with the same rules. As an *upper bound* on what the free parameters can
make of a node (if the bound is not everything, some targets are out of reach), and as a description
of *what the context can make of a node* (if that is everything, some context asks for such a target).
"""

from __future__ import annotations

from enum import Enum


class Reach(Enum):
    """Sets of vectors, named by what limits them; `ALL` is no limit, `POINT` cannot move at all."""

    POINT = "a single point"
    SIMPLEX = "the simplex"
    SPHERE = "a sphere"
    BALL = "a bounded set"
    NON_NEGATIVE = "bounded below in every coordinate"
    NON_POSITIVE = "bounded above in every coordinate"
    ORTHANT = "bounded on one side in every coordinate"
    PROPER = "less than the whole space (a subspace or a cone)"
    ALL = "the whole space"

    @property
    def bounded(self) -> bool:
        return self in (Reach.POINT, Reach.SIMPLEX, Reach.SPHERE, Reach.BALL)

    @property
    def one_sided(self) -> bool:
        return self in (Reach.NON_NEGATIVE, Reach.NON_POSITIVE, Reach.ORTHANT)


def sum_of(a: Reach, b: Reach) -> Reach:
    """The reach of u + w where u and w move on their own."""
    if a is Reach.POINT or b is Reach.POINT:
        return b if a is Reach.POINT else a
    if a.bounded and b.bounded:
        return Reach.BALL
    if a.bounded or b.bounded:
        return b if a.bounded else a
    if a.one_sided and a is b and a is not Reach.ORTHANT:
        return a
    return Reach.ALL  # opposite sides, subspaces and cones may add up to everything


def product_of(a: Reach, b: Reach) -> Reach:
    """The reach of u * w, coordinate by coordinate; a point stands for a vector without zeros."""
    if a is Reach.POINT or b is Reach.POINT:
        other = b if a is Reach.POINT else a
        if other is Reach.POINT:
            return other
        return Reach.BALL if other.bounded else Reach.ORTHANT if other.one_sided else other
    return Reach.BALL if a.bounded and b.bounded else Reach.ALL


def scaled(a: Reach, alpha: float) -> Reach:
    """The reach of alpha * u for a known number alpha."""
    if alpha == 0:
        return Reach.POINT
    if alpha < 0 and a.one_sided:
        swap = {Reach.NON_NEGATIVE: Reach.NON_POSITIVE, Reach.NON_POSITIVE: Reach.NON_NEGATIVE}
        return swap.get(a, a)
    return Reach.BALL if a in (Reach.SIMPLEX, Reach.SPHERE) and alpha != 1 else a


def mapped(a: Reach, wide: bool | None) -> Reach:
    """The reach of W u for a known W; `wide`: has it at least as many columns as rows (None: unknown)?"""
    if a is Reach.POINT:
        return a
    if a.bounded:
        return Reach.BALL
    if a is Reach.ALL:
        return Reach.PROPER if wide is False else Reach.ALL
    return Reach.ALL if wide is not False else Reach.PROPER


def covers(a: Reach, b: Reach) -> bool:
    """Whether a set limited like `a` may hold every set limited like `b`; only a False is a proof."""
    if a is Reach.ALL or b is Reach.POINT:
        return True
    if a is Reach.POINT:
        return False
    if a.bounded:
        return b.bounded
    if a.one_sided:
        return b.bounded or b.one_sided
    return b is not Reach.ALL
