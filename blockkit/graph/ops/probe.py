"""Declarations tried on random numbers before they are believed; what is false is shown by a counterexample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ...errors import BadInput, blamed
from ..arrays import NumpyArrays
from .base import Argument, Shape
from .declaration import Declaration, shape_of_result, solved

EXACT = 1e-9  # relative
TOKENS = 24
SPREADS = (0.1, 0.5, 1.0, 1.0, 2.0, 3.0)  # of the random rows, in turn
MOST_NUMBERS = 4_000_000
SHOWN = 4  # numbers of a vector in a message
Values = list[np.ndarray]


@lru_cache(maxsize=4096)
def probe(operation: Declaration, args: tuple[Argument, ...]) -> None:
    """Tries all that a user's operation declares, for arguments of these shapes (symbols get small numbers).

    Raises:
        BadInput: a declaration is false, or the operation fails; the message shows on which values.
    """
    symbols = sorted({s for a in args for size in a.shape for s in size.symbols})
    constants = {s: 4 + i for i, s in enumerate(symbols)}
    bound = tuple(replace(a, shape=tuple(s.bind(constants) for s in a.shape)) for a in args)
    if sum(TOKENS * _total(a.shape) if not a.parameter else _total(a.shape) for a in bound) > MOST_NUMBERS:
        raise BadInput(
            f"{operation.kind} is too large to try on random numbers; keep its matrices in linear components"
        )
    _Probe(operation, bound).run()


def _total(shape: Shape) -> int:
    return int(np.prod([s.known or 1 for s in shape]))


@dataclass(frozen=True)
class _Probe:
    """One operation with arguments of known sizes."""

    operation: Declaration
    args: tuple[Argument, ...]

    def run(self) -> None:
        """All trials, the plainest first."""
        rng = np.random.default_rng(0)
        (width,) = shape_of_result(self.operation, self.args)
        values = [self._drawn(rng, a) for a in self.args]
        result = self._computed(values)
        if result.shape != (TOKENS, width.known):
            raise self._false(f"the shape rule says {[TOKENS, width.known]}, compute gives {list(result.shape)}")
        self._finite_and_in_range(values, result)
        self._repeatable(values, result)
        self._token_wise(values, result)
        self._injective(rng, values, result)
        for position, name in enumerate(self.operation.arguments()):
            if name in self.operation.solutions():
                self._law(rng, position, name, values, result)

    def _drawn(self, rng: np.random.Generator, arg: Argument) -> np.ndarray:
        shape = tuple(s.known or 1 for s in arg.shape)
        found = rng.normal(size=shape) if arg.parameter else _rows(rng, shape[0])
        found.flags.writeable = False
        return found

    def _computed(self, values: Sequence[np.ndarray]) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):
                return np.asarray(self.operation.compute(NumpyArrays(), *values))
        except Exception as error:
            shapes = ", ".join(str(list(v.shape)) for v in values)
            raise BadInput(f"{self.operation.kind}: compute failed on arrays {shapes}: {blamed(error)}") from error

    def _finite_and_in_range(self, values: Values, result: np.ndarray) -> None:
        operation = self.operation
        low = -np.inf if operation.low is None else operation.low
        high = np.inf if operation.high is None else operation.high
        trials = ((~np.isfinite(result), "the result must be a finite number for all arguments"),
                  (result < low, f"low = {low:g} is declared"), (result > high, f"high = {high:g} is declared"),
                  ((result == 0) & (not operation.vanishes),
                   "the result is exactly zero; if whole regions give that, declare vanishes = True"))  # fmt: skip
        for bad, what in trials:
            if bad.any():
                row, column = (int(i) for i in np.argwhere(bad)[0])
                raise self._false(f"{what}, but {self._shown(values, row, column)} gives {result[row, column]:.6g}")

    def _repeatable(self, values: Values, result: np.ndarray) -> None:
        again = self._computed(values)
        if not np.array_equal(again, result):
            row, column = (int(i) for i in np.argwhere(again != result)[0])
            raise self._false(f"the same arguments ({self._shown(values, row, column)}) gave {result[row, column]:.6g} "
                              f"and then {again[row, column]:.6g}")  # fmt: skip

    def _token_wise(self, values: Values, result: np.ndarray) -> None:
        for row in range(TOKENS):
            alone = self._computed(
                [v if a.parameter else v[row : row + 1] for a, v in zip(self.args, values, strict=True)]
            )
            if alone.shape != (1, result.shape[1]):
                raise self._false(f"one token alone gives a result of shape {list(alone.shape)}")
            if _off(alone, result[row : row + 1]) > EXACT:
                column = int(np.argmax(np.abs(alone[0] - result[row])))
                raise self._false(
                    f"a row of the result must hang on the same row of the arguments only, but "
                    f"{self._shown(values, row, column)} gives {result[row, column]:.6g} among {TOKENS} tokens and "
                    f"{alone[0, column]:.6g} alone"
                )

    def _injective(self, rng: np.random.Generator, values: Values, result: np.ndarray) -> None:
        if not self.operation.injective:
            return
        for position, arg in enumerate(self.args):
            if arg.parameter:
                continue
            u = values[position]
            for other in (-u, 2 * u, u + 1, u[:, ::-1], u + 1e-3 * rng.normal(size=u.shape), _rows(rng, u.shape[1])):
                changed = self._computed([*values[:position], other, *values[position + 1 :]])
                same = (changed == result).all(axis=1) & (other != u).any(axis=1)
                if same.any():
                    row = int(np.argmax(same))
                    name = self.operation.arguments()[position]
                    raise self._false(f"injective is declared, but {self._shown(values, row, 0)} and "
                                      f"{name} = {_vector(other[row], 0)} give the same result")  # fmt: skip

    def _law(self, rng: np.random.Generator, position: int, name: str, values: Values, result: np.ndarray) -> None:
        """forward(solve(target)) = target, for targets in the declared reach."""
        spread = [v if v.ndim == 2 else np.tile(v, (TOKENS, 1)) for v in values]
        if self.args[position].parameter and _off(self._computed(spread), result) > EXACT:
            raise self._false(f"{name} has a law, so compute must take it as [width] and as [tokens, width]")
        target = self._targets(rng, position, spread, result)
        try:
            found = solved(self.operation, position, target, spread)
        except Exception as error:
            raise BadInput(f"{self.operation.kind}: the law for {name} failed: {blamed(error)}") from error
        if found.shape != spread[position].shape:
            shapes = f"{list(found.shape)}, not {list(spread[position].shape)}"
            raise self._false(f"the law for {name} gives an array {shapes}")
        reached = self._computed([*spread[:position], found, *spread[position + 1 :]])
        with np.errstate(all="ignore"):
            off = np.abs(reached - target) / np.abs(target).max(axis=1, keepdims=True)
        bad = ~(off <= EXACT)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            others = [i for i in range(len(values)) if i != position]
            given = f" with {self._shown(spread, row, column, others)}" if others else ""
            raise self._false(
                f"the law for {name} is false: asked for {_vector(target[row], column)}{given}, it gives "
                f"{name} = {_vector(found[row], column)}, and with that compute gives {_vector(reached[row], column)}"
            )

    def _targets(self, rng: np.random.Generator, position: int, spread: Values, result: np.ndarray) -> np.ndarray:
        """Random targets `[tokens, width]` in all of the reach that is declared."""
        operation = self.operation
        if operation.solutions()[operation.arguments()[position]].partial:
            other = _rows(rng, spread[position].shape[1])
            return self._computed([*spread[:position], other, *spread[position + 1 :]])
        drawn, low, high = _rows(rng, result.shape[1]), operation.low, operation.high
        if low is not None and high is not None:
            return np.asarray(low + (high - low) * rng.uniform(0.02, 0.98, size=drawn.shape))
        if low is not None:
            return low + np.abs(drawn)
        return drawn if high is None else high - np.abs(drawn)

    def _shown(self, values: Values, row: int, column: int, positions: Sequence[int] | None = None) -> str:
        names = self.operation.arguments()
        chosen = range(len(values)) if positions is None else positions
        parts = []
        for i in chosen:
            value = values[i] if self.args[i].parameter and values[i].ndim == 1 else values[i][row]
            matrix = len(self.args[i].shape) == 2
            parts.append(f"{names[i]} = " + (f"a matrix {list(values[i].shape)}" if matrix else _vector(value, column)))
        return ", ".join(parts)

    def _false(self, what: str) -> BadInput:
        return BadInput(f"{self.operation.kind}: {what}")


def _rows(rng: np.random.Generator, width: int) -> np.ndarray:
    spreads = np.resize(SPREADS, TOKENS)[:, None]
    return np.asarray(spreads * rng.normal(size=(TOKENS, width)))


def _off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error, relative to the largest number wanted; infinite where there is no number."""
    off = float(np.abs(found - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
    return off if np.isfinite(off) else np.inf


def _vector(value: np.ndarray, column: int) -> str:
    """A vector in a message: around the coordinate that matters, where it is long."""
    start = max(0, min(column, len(value) - SHOWN))
    stop = min(len(value), start + SHOWN)
    part = ", ".join(f"{v:.6g}" for v in value[start:stop])
    return f"[{'..., ' if start else ''}{part}{', ...' if stop < len(value) else ''}]"
