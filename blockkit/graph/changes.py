"""Changes of parameters, kept beside the originals as factors, and how a run applies them.

A change is small: two thin factors for a matrix, a vector for a vector. *Factored* application adds
the change to the result, y = W z + U^T (V z), and never forms a dense matrix. *Merged* application
rounds W + U^T V to the weight's dtype first, as a saved checkpoint would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array, Arrays, wide_dtype
from .graph import Node
from .packing import Packing


@dataclass(frozen=True)
class MatrixChange:
    """dW = left^T right. `left [rank, d_out]`, `right [rank, d_in]`; per token, row t serves token t alone."""

    left: Any
    right: Any
    per_token: bool = False


@dataclass(frozen=True)
class VectorChange:
    """A shift `[width]` of a vector; per token `[tokens, width]`."""

    delta: Any
    per_token: bool = False


Change = MatrixChange | VectorChange


def change_of(factors: Sequence[Any], per_token: bool) -> Change:
    """The change that has these parts: two factors for a matrix, one shift for a vector."""
    if len(factors) == 2:
        return MatrixChange(factors[0], factors[1], per_token)
    return VectorChange(factors[0], per_token)


Overlay = Mapping[str, Change]


def plus(first: Change | None, second: Change) -> Change:
    """The sum of two changes of one parameter; factors that read the same directions are added in place."""
    if first is None:
        return second
    if isinstance(first, MatrixChange) and isinstance(second, MatrixChange):
        if np.array_equal(first.right, second.right):
            return MatrixChange(first.left + second.left, second.right, second.per_token)
        if not second.per_token:
            left, right = (np.concatenate([a, b]) for a, b in ((first.left, second.left), (first.right, second.right)))
            return MatrixChange(left, right)
    elif isinstance(first, VectorChange) and isinstance(second, VectorChange):
        return VectorChange(first.delta + second.delta, second.per_token)
    raise TypeError("these two changes do not add up")


def narrowed(change: Change, dtype: str) -> Change:
    """The change as a patch holds it: float64 for a model that runs in float64, else float32.

    A run narrows what it solves for before it goes on, so that what this rounds off is seen, and made up for.
    """
    held = np.float64 if dtype == "float64" else np.float32
    if isinstance(change, MatrixChange):
        left, right = (np.ascontiguousarray(f, held) for f in (change.left, change.right))
        return MatrixChange(left, right, change.per_token)
    return VectorChange(np.ascontiguousarray(change.delta, held), change.per_token)


def shape_of(change: Change) -> tuple[int, ...]:
    """The shape of the parameter that a static change fits."""
    if isinstance(change, MatrixChange):
        return change.left.shape[-1], change.right.shape[-1]
    return tuple(change.delta.shape)


def dense(weight: np.ndarray, change: Change) -> np.ndarray:
    """The changed parameter, float64, of the original `weight` (a static change)."""
    wide = weight.astype(np.float64)
    if isinstance(change, MatrixChange):
        return wide + np.asarray(change.left, np.float64).T @ np.asarray(change.right, np.float64)
    return wide + np.asarray(change.delta, np.float64)


def merged(xp: Arrays, weight: Array, change: Change) -> Array:
    """The changed parameter, rounded to the weight's own dtype, computed where the weight lives."""
    dtype = xp.dtype_of(weight)
    wide = xp.cast(weight, wide_dtype(dtype))
    if isinstance(change, MatrixChange):
        return xp.cast(wide + xp.matmul(xp.transpose(change.left, (1, 0)), change.right), dtype)
    return xp.cast(wide + change.delta, dtype)


def changed_forward(
    xp: Arrays, node: Node, args: Sequence[Any], packing: Packing, position: int, change: Change
) -> Array:
    """The node's value with the change at `position` kept beside the parameter, as factors."""
    dtype = xp.dtype_of(next(v for a, v in zip(node.args, args, strict=True) if a != node.args[position]))
    wide = wide_dtype(dtype)
    if isinstance(change, VectorChange):
        shifted = xp.cast(args[position], wide) + change.delta
        others = [xp.cast(a, wide) for a in args]
        name = node.args[position]
        moved = [shifted if a == name else other for a, other in zip(node.args, others, strict=True)]
        return xp.cast(node.op.forward(xp, moved, packing), dtype)
    unchanged = xp.cast(node.op.forward(xp, args, packing), wide)
    return xp.cast(unchanged + added(xp, xp.cast(args[0], wide), change), dtype)


def added(xp: Arrays, z: Array, change: MatrixChange) -> Array:
    """What a changed matrix adds to its product with `z [tokens, d_in]`: `[tokens, d_out]`."""
    if change.per_token:
        return xp.mean(z * change.right) * int(z.shape[-1]) * change.left
    return xp.matmul(xp.linear(z, change.right), change.left)


def parts(change: Change) -> tuple[np.ndarray, ...]:
    """The arrays that a change consists of."""
    return (change.left, change.right) if isinstance(change, MatrixChange) else (change.delta,)


def digest(change: Change) -> bytes:
    """A hash of a change's numbers, in float32."""
    found = hashlib.sha256()
    for part in parts(change):
        found.update(np.ascontiguousarray(part, np.float32).tobytes())
    return found.digest()
