"""Operations of a user's own as the planner sees them.

Every declaration is tried on random numbers (`probe.py`) when a graph that holds the operation is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..laws import Action, Law
from ..packing import Packing
from ..reach import Reach
from .base import Argument, Op, Shape, Vanish
from .declaration import Declaration, shape_of_result, shown, solved
from .probe import probe


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
        names = self.operation.arguments()
        if len(args) != len(names) or not args or args[0].parameter:
            raise BadInput(f"{self.kind} takes {shown(names)}, the first a signal; got {len(args)} argument(s)")
        for name, arg in zip(names, args, strict=True):
            if len(arg.shape) == 2 and name in self.operation.solutions():
                raise BadInput(f"{self.kind}: {name} is a matrix; only signals and vectors can have a law of their own")
        try:
            probe(self.operation, tuple(args))
        except TypeError as error:
            raise BadInput(f"{self.kind}: its settings must be hashable (tuples, not lists): {error}") from error
        return shape_of_result(self.operation, args)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
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
        """The argument at `position` that makes the result `target [tokens, width]`; see `declaration.solved`."""
        return solved(self.operation, position, target, args)

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
