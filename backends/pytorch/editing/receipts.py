"""What is said of a patch that was put on a model, or could not be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from blockkit.graph.changes import Change, MatrixChange
from blockkit.patch.in_place import ChangedParameter
from blockkit.patch.patch import Patch

from .changed import PIECE
from .slots import Slot


def row(slot: Slot, change: Change, how: str, residual: float) -> ChangedParameter:
    """The receipt's row of a parameter that was changed; `residual` is how far off it was when read back."""
    tensor = slot.tensor
    largest, norm = _sizes(change)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ChangedParameter(slot.name, tuple(tensor.shape), dtype, how, largest, norm, residual)


def _sizes(change: Change) -> tuple[float, float]:
    """Largest absolute value and Frobenius norm of a change; of all its rows together, where each has its own."""
    if not isinstance(change, MatrixChange):
        delta = np.asarray(change.delta, np.float64)
        return float(np.abs(delta).max(initial=0)), float(np.linalg.norm(delta))
    left, right = (np.asarray(f, np.float64) for f in (change.left, change.right))
    if change.per_token or len(left) == 1:
        largest = np.abs(left).max(-1, initial=0) * np.abs(right).max(-1, initial=0)
        norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
        return float(largest.max(initial=0)), float(np.linalg.norm(norms))
    step = max(1, PIECE // right.shape[1])
    pieces = (left[:, start : start + step].T @ right for start in range(0, left.shape[1], step))
    largest_of_all = max((float(np.abs(piece).max(initial=0)) for piece in pieces), default=0.0)
    return largest_of_all, float(np.sqrt(max(0.0, ((left @ left.T) * (right @ right.T)).sum())))


def said(patch: Patch) -> str:
    """The patch, as messages name it."""
    return f"the patch {patch.source}" if patch.source else f"the patch of {some(patch.changes)}"


def some(names: Iterable[str]) -> str:
    """The first of the names."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
