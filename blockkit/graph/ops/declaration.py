"""What an operation of a user's own declares of itself.

An operation says how its result is computed and, for as many of its arguments as its author likes, how to solve
for them. Without any such law it is opaque: it can be run, and the planner goes around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import numpy as np

from ...errors import BadInput, blamed
from ..arrays import Array, Arrays
from ..sizes import Size
from .base import Argument, Shape, show_shape

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Solution:
    """A declared law: the method that solves for one argument, and what it says of itself (see `solves`)."""

    method: str
    argument: str
    formula: str
    nonzero: tuple[str, ...]
    partial: str


def solves(argument: str, formula: str, nonzero: Sequence[str] = (), partial: str = "") -> Callable[[Method], Method]:
    """Declares that a method solves for `argument`: `method(self, t, *arguments)` gives the value of it that makes
    the result t.

    Every array it gets is `[tokens, width]` (a matrix `[d_out, d_in]`), parameters too, in NumPy and float64.

    Args:
        argument: a signal, or a parameter that is a vector.
        formula: the solution in words, for plans: `"u' = asinh(t / gain)"`.
        nonzero: the arguments by whose coordinates it divides.
        partial: if this argument alone cannot bring about every result (beyond `low` and `high`), what limits it.
    """

    def declare(method: Method) -> Method:
        method.__dict__["_solves"] = Solution("", argument, formula, tuple(nonzero), partial)
        return method

    return declare


class Declaration:
    """What an operation says of itself. Whatever is left out is not assumed.

    Attributes:
        parameters: the arguments of `compute`, its last ones, that are stored vectors.
        low, high: every coordinate of every result lies between them.
        vanishes: whole regions of arguments give results that are exactly zero somewhere.
        injective: different values of a signal, all else equal, give different results.
    """

    kind: ClassVar[str] = ""
    parameters: ClassVar[tuple[str, ...]] = ()
    low: ClassVar[float | None] = None
    high: ClassVar[float | None] = None
    vanishes: ClassVar[bool] = False
    injective: ClassVar[bool] = False

    def compute(self, xp: Arrays, *args: Any) -> Array:
        """The result `[tokens, width]`, each row from the same row of the arguments.

        Name the arguments one by one: signals `[tokens, width]` first, then parameters (a vector `[width]`, or
        `[tokens, width]` where every token has a patch of its own). `xp` has the array functions that every
        backend knows (`blockkit.graph.arrays.Arrays`); an operation that is run on NumPy alone may use NumPy.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method compute(self, xp, ...)")

    def shape(self, *shapes: Shape) -> Shape:
        """The shape of a result row, from the shapes of the arguments; by default that of the first."""
        return shapes[0]

    @classmethod
    def arguments(cls) -> tuple[str, ...]:
        """The names of the arguments of `compute`.

        Raises:
            BadInput: `compute` does not name them one by one.
        """
        names = list(inspect.signature(cls.compute).parameters.values())[2:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in names):
            raise BadInput(f"{cls.__name__}.compute: name its arguments one by one, as compute(self, xp, u, gain)")
        return tuple(p.name for p in names)

    @classmethod
    def solutions(cls) -> Mapping[str, Solution]:
        """The declared laws by argument."""
        return _solutions(cls)  # type: ignore[arg-type]


@cache
def _solutions(cls: type[Declaration]) -> Mapping[str, Solution]:
    names, found = cls.arguments(), {}
    for attribute in dir(cls):
        law = getattr(getattr(cls, attribute, None), "_solves", None)
        if not isinstance(law, Solution):
            continue
        for name in (law.argument, *law.nonzero):
            if name not in names:
                raise BadInput(f"{cls.__name__}.{attribute}: compute has no argument {name!r}; it has {shown(names)}")
        if law.argument in found:
            raise BadInput(f"{cls.__name__} has two laws for {law.argument!r}; one is enough")
        found[law.argument] = replace(law, method=attribute)
    return found


def shape_of_result(operation: Declaration, args: Sequence[Argument]) -> Shape:
    """What the declared shape rule gives.

    Raises:
        BadInput: it fails, or gives something else than a vector.
    """
    try:
        found = tuple(Size.of(s) for s in operation.shape(*(a.shape for a in args)))
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{operation.kind}: its shape rule failed: {blamed(error)}") from error
    if len(found) != 1:
        raise BadInput(f"{operation.kind}: its shape rule gives {show_shape(found)}; a result is a vector")
    return found


def solved(operation: Declaration, position: int, target: np.ndarray, args: Sequence[np.ndarray]) -> np.ndarray:
    """The argument at `position` that makes the result `target [tokens, width]`; not finite where there is none."""
    found = operation.solutions()[operation.arguments()[position]]
    with np.errstate(all="ignore"):
        return np.asarray(getattr(operation, found.method)(target, *args), dtype=np.float64)


def shown(names: Sequence[str]) -> str:
    """Names of arguments in a message."""
    return ", ".join(names) or "none"
