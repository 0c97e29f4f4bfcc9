"""Operations of a user's own: what they declare of themselves, and how the planner sees them.

An operation says how its result is computed and, for as many of its arguments as its author likes, how to solve
for them. Without any such law it is opaque: it can be run, and the planner goes around it. Every declaration is
tried on random numbers (`blockkit.probe`) when a graph that holds the operation is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import numpy as np

from .arrays import Array, Arrays
from .errors import BadInput, blamed
from .laws import Action, Law
from .layout import Layout
from .ops import Argument, Op, Shape, Vanish, show_shape
from .reach import Reach
from .sizes import Size

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
        backend knows (`blockkit.arrays.Arrays`); an operation that is run on NumPy alone may use NumPy.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method compute(self, xp, ...)")

    def shape(self, *shapes: Shape) -> Shape:
        """The shape of a result row, from the shapes of the arguments; by default that of the first."""
        return shapes[0]

    @classmethod
    def arguments(cls) -> tuple[str, ...]:
        """The names of the arguments of `compute`."""
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
                raise BadInput(f"{cls.__name__}.{attribute}: compute has no argument {name!r}; it has {_listed(names)}")
        if law.argument in found:
            raise BadInput(f"{cls.__name__} has two laws for {law.argument!r}; one is enough")
        found[law.argument] = replace(law, method=attribute)
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


@dataclass(frozen=True)
class Custom(Op):
    """A user's operation as a node of a graph."""

    operation: Declaration

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.operation.kind

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return self.operation.injective

    def infer(self, args: Sequence[Argument]) -> Shape:
        """The declared shape, once all declarations have been tried on numbers.

        Raises:
            BadInput: the arguments do not fit, or a declaration is false; the message shows the counterexample.
        """
        from .probe import probe

        names = self.operation.arguments()
        if len(args) != len(names) or not args or args[0].parameter:
            raise BadInput(f"{self.kind} takes {_listed(names)}, the first a signal; got {len(args)} argument(s)")
        for name, arg in zip(names, args, strict=True):
            if len(arg.shape) == 2 and name in self.operation.solutions():
                raise BadInput(f"{self.kind}: {name} is a matrix; only signals and vectors can have a law of their own")
        try:
            probe(self, tuple(args))
        except TypeError as error:
            raise BadInput(f"{self.kind}: its settings must be hashable (tuples, not lists): {error}") from error
        return self.shape(args)

    def shape(self, args: Sequence[Argument]) -> Shape:
        """What the shape rule gives."""
        try:
            found = tuple(Size.of(s) for s in self.operation.shape(*(a.shape for a in args)))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{self.kind}: its shape rule failed: {blamed(error)}") from error
        if len(found) != 1:
            raise BadInput(f"{self.kind}: its shape rule gives {show_shape(found)}; a result is a vector")
        return found

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return self.operation.compute(xp, *args)

    def law(self, position: int, args: Sequence[Argument]) -> Law | None:
        """The declared law for that argument; see `Op.law`."""
        names = self.operation.arguments()
        found = self.operation.solutions().get(names[position])
        if found is None:
            return None
        reach, limit = self.range, self._limit()
        if found.partial:
            reach, limit = Reach.PROPER, found.partial
        nonzero = tuple(names.index(n) for n in found.nonzero)
        return Law(f"{self.kind}.{found.argument}", Action.INVERT, found.formula, "declared by its author, and probed",
                   reach, nonzero, True, limit)  # fmt: skip

    def solve(self, position: int, target: np.ndarray, args: Sequence[np.ndarray]) -> np.ndarray:
        """The argument at `position` that makes the result `target [tokens, width]`; not finite where there is none."""
        found = self.operation.solutions()[self.operation.arguments()[position]]
        with np.errstate(all="ignore"):
            return np.asarray(getattr(self.operation, found.method)(target, *args), dtype=np.float64)

    @property
    def range(self) -> Reach:
        """All that results can be."""
        low, high = self.operation.low, self.operation.high
        if low is None:
            return Reach.ALL if high is None else Reach.NON_POSITIVE
        return Reach.NON_NEGATIVE if high is None else Reach.BALL

    def _limit(self) -> str:
        low, high = self.operation.low, self.operation.high
        bounds = [
            f"never below {low:g}" if low is not None else "",
            f"never above {high:g}" if high is not None else "",
        ]
        return f"its results are {' and '.join(b for b in bounds if b)}"

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if all(r is Reach.POINT for r in moved) else self.range

    def fills(self, filled: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        """Without a law for an argument that fills its space, nothing is known of the results."""
        names = self.operation.arguments()
        laws = [self.law(i, args) for i, _ in enumerate(names) if filled[i] is Reach.ALL]
        return self.range if any(law is not None and law.reach is self.range for law in laws) else Reach.POINT

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if self.operation.vanishes else max(args)
