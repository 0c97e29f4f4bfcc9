"""The laws: how each operation is solved for one of its arguments, its result and the others given.

A law is a description; no numbers are touched here (`blockkit.solve.step` does the arithmetic). A
parameter is an argument that may be solved for and then stored; a signal is an argument that has to
be steered further upstream. Sources: *Equivalence of Context and Parameter Updates in Modern
Transformer Blocks* (arXiv 2511.17864); the generalisation to one inverse per operation and argument
is this project's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .reach import Reach
from .sizes import Capacity, Size


class Action(Enum):
    """What solving for the argument amounts to; `blockkit.solve.step` has one rule for each."""

    SHIFT = "shift"  # the change of the result is the change of the argument
    DIVIDE = "divide"  # divide by the other factor, coordinate by coordinate
    SCALE = "scale"  # divide by a known number
    WEIGHT = "weight"  # least-norm change of a matrix
    THROUGH = "through"  # least-norm solution through a known matrix
    PLACE = "place"  # put the target where the slice was taken
    INVERT = "invert"  # inverse of a bijection
    DIRECTION = "direction"  # set the direction of what a norm reads
    JOINT = "joint"  # one equation for a vector that reaches the goal in several ways
    JOINT_WEIGHT = "joint weight"  # the same for a matrix


class Kind(Enum):
    """How a condition fails: on a set of measure zero, in whole regions, or by the choice of sizes."""

    GENERIC = "generic"
    OPEN = "open"
    SIZE = "size"

    @property
    def meaning(self) -> str:
        """How a condition of this kind fails, in words."""
        return _HOW_IT_FAILS[self]


_HOW_IT_FAILS = {
    Kind.GENERIC: "fails only on a set of measure zero",
    Kind.OPEN: "fails for whole regions of contexts",
    Kind.SIZE: "depends on sizes that are still symbols",
}


@dataclass(frozen=True)
class Condition:
    """Something that must hold of the values (or sizes) for a law to be exact."""

    node: str
    text: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.text} [{self.kind.value}]"


def legend(conditions: Iterable[Condition]) -> list[str]:
    """A line for each kind among the conditions: what its tag means, below where the tags appear."""
    used = {condition.kind for condition in conditions}
    return [f"[{kind.value}]: {kind.meaning}" for kind in Kind if kind in used]


@dataclass(frozen=True)
class Law:
    """The inverse of one operation in one argument.

    Attributes:
        name: `operation.argument`.
        action: which rule of `blockkit.solve.step` carries it out.
        formula: the solution for a target t, in words of the operation.
        reach: which results can be had by moving this argument alone.
        nonzero: positions of the arguments that must not vanish.
        whole: whether `nonzero` asks for some coordinate only (a vector) or for all of them.
        limit: for a reach less than all, what limits it.
        source: lemma of the paper, or what it extends.
        fact: a further condition, in words, that fails only on a set of measure zero.
    """

    name: str
    action: Action
    formula: str
    source: str
    reach: Reach = Reach.ALL
    nonzero: tuple[int, ...] = ()
    whole: bool = False
    limit: str = ""
    fact: str = ""


def shift_law(operation: str, parameter: bool) -> Law:
    formula = "b' = b + (t - y)" if parameter else "u -> u + (t - y)"
    return Law(f"{operation}.term", Action.SHIFT, formula, "Lemma 8 (outer bias)")


def divide_law(operation: str, other: int, offset: float) -> Law:
    """A product solved for one factor; the argument at `other` is the one to divide by."""
    shown = f"{offset:g} + m" if offset else "m"
    return Law(
        f"{operation}.factor",
        Action.DIVIDE,
        f"m' = m + (t - y) / u, for y = ({shown}) * u",
        "Lemma 10 (outer element-wise multiply)",
        nonzero=(other,),
        whole=True,
    )


def scale_law(alpha: float) -> Law | None:
    if alpha == 0:
        return None
    return Law("scale.input", Action.SCALE, f"u -> u + (t - y) / {alpha:g}", "linearity")


def weight_law() -> Law:
    return Law(
        "matmul.weight",
        Action.WEIGHT,
        "W' = W + (t - W z) z^T / |z|^2",
        "Lemma 6 (input side), Lemma 9 (outer matrix)",
        nonzero=(0,),
    )


def through_law() -> Law:
    """A known matrix solved for what it reads; how much passes depends on the whole way (`analysis.window`)."""
    return Law(
        "matmul.input",
        Action.THROUGH,
        "z -> z + W^+ (t - W z), the least-norm solution",
        "linearity",
        fact="has full rank",
    )


def place_law(operation: str) -> Law:
    """A slice or a concatenation solved for what it reads; what passes depends on the whole way."""
    formula = "u[start:stop] -> t" if operation == "slice" else "u -> t[start:stop]"
    return Law(f"{operation}.input", Action.PLACE, formula, "re-arrangement")


def invert_law(operation: str, fn: str) -> Law:
    return Law(f"{operation}.input", Action.INVERT, f"u -> {fn}^-1(t)", "bijection")


def limited_law(operation: str, reach: Reach, limit: str) -> Law:
    """A law that reaches only part of the results: it cannot carry an arbitrary target."""
    return Law(f"{operation}.input", Action.INVERT, "u -> f^-1(t) on its range", "partial", reach, limit=limit)


def direction_law(operation: str, limit: str) -> Law:
    """A norm solved for what it reads: only a direction can be set through it."""
    return Law(
        f"{operation}.input",
        Action.DIRECTION,
        "h -> rms(h_C) n, with n the unit-RMS vector closest to t / m",
        "stable construction",
        Reach.SPHERE,
        limit=limit,
    )


def joint_law(matrix: bool) -> Law:
    """A parameter with several linear ways to the goal, solved for by the sum of all of them."""
    action = Action.JOINT_WEIGHT if matrix else Action.JOINT
    return Law("joint", action, "p -> p + L^+ (t - y), L the sum of its linear ways to y", "linearity")


def parameter_capacity(action: Action, shape: tuple[Size, ...]) -> Capacity:
    """How many tokens one static value of the parameter serves: d_in for a matrix, 1 for a vector."""
    return Capacity.of(shape[1]) if action is Action.WEIGHT else Capacity.of(1)
