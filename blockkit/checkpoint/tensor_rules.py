"""Where a parameter slot's values lie in a checkpoint: part of one tensor, or one tensor for each expert.

The rules are written in the catalogue (see `blockkit.checkpoint.model`); the same rule reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadInput
from .formula import evaluated

KEYS = ("tensor", "stack", "count", "axis", "shape", "take", "transpose")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The values of one slot, as the checkpoint holds them.

    Attributes:
        tensors: the tensors that hold them: one, or one for each expert.
        slot: the slot's shape in the kit's orientation.
        axis: along which the tensors' parts are joined.
        shape: what a stored tensor is reshaped to first; None for its own shape.
        index: what is taken of it then.
        axes: the order of the axes after that; None as they are.
    """

    tensors: tuple[str, ...]
    slot: Shape
    axis: int = 0
    shape: Shape | None = None
    index: tuple[int | slice, ...] = ()
    axes: tuple[int, ...] | None = None

    def fault(self, shapes: Mapping[str, Shape]) -> str | None:
        """What is wrong with the stored tensors, in words; None if they fit."""
        for name in self.tensors:
            stored = shapes.get(name)
            if stored is None:
                return f"{name} is missing"
            if self.shape is not None and not _joined(stored, self.shape):
                return f"{name} has shape {list(stored)}, expected {list(self.shape)} with neighbours joined"
            if not self._fits(stored):
                return f"{name} has shape {list(stored)}, expected {self._expected(stored)}"
        return None

    def read(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The slot's values, of all stored tensors."""
        parts = [self._view(t).reshape(self._one) for t in tensors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.axis)

    def write(self, tensors: Sequence[np.ndarray], value: np.ndarray) -> None:
        """Puts the slot's values into its place in the stored tensors (contiguous, writable)."""
        for tensor, part in zip(tensors, np.split(value, len(tensors), axis=self.axis), strict=True):
            view = self._view(tensor)
            view[...] = part.reshape(view.shape)

    @property
    def whole(self) -> bool:
        """Whether one tensor holds the slot and nothing else."""
        return len(self.tensors) == 1 and self.shape is None and not self.index

    @property
    def transposed(self) -> bool:
        """Whether a matrix is stored `[d_in, d_out]`."""
        return self.axes == (1, 0)

    @property
    def _one(self) -> Shape:
        """The shape of what one tensor gives."""
        return tuple(n // len(self.tensors) if i == self.axis else n for i, n in enumerate(self.slot))

    def _view(self, tensor: np.ndarray) -> np.ndarray:
        taken = tensor.reshape(self.shape or tensor.shape)[self.index]
        return taken if self.axes is None else taken.transpose(self.axes)

    def _fits(self, stored: Shape) -> bool:
        try:
            found = self._view(np.broadcast_to(np.empty(()), self.shape or stored)).shape
        except (IndexError, ValueError):
            return False
        plain = self.shape is None and not self.index
        return found == self._one if plain else math.prod(found) == math.prod(self._one)

    def _expected(self, stored: Shape) -> str:
        if self.shape is not None or self.index:
            return f"one of whose parts gives {list(self._one)}"
        return str([self._one[self.axes.index(i)] for i in range(len(self._one))] if self.axes else list(self._one))


def _joined(stored: Shape, split: Shape) -> bool:
    """Whether joining neighbouring axes of `split` gives the stored shape."""
    rest = list(split)
    for size in stored:
        product = 1
        while rest and (product < size or rest[0] == 1) and product * rest[0] <= size:
            product *= rest.pop(0)
        if product != size:
            return False
    return not rest


def part_of(rule: Any, slot: Shape, layer: str, prefix: str, constants: Mapping[str, Any]) -> Part:
    """The part that one rule of the catalogue means for a slot of that shape.

    Args:
        layer: what `*` in the tensor's name stands for.
        prefix: what goes before the tensor's name.

    Raises:
        BadInput: the rule is none that is known.
    """
    rule = {"tensor": rule} if isinstance(rule, str) else rule
    for key in rule:
        if key not in KEYS:
            raise BadInput(f"unknown key {key!r} in a tensor rule; allowed are {', '.join(KEYS)}")
    name = prefix + str(rule.get("tensor") or rule["stack"]).replace("*", layer, 1)
    count = int(evaluated(rule["count"], constants)) if "stack" in rule else 1
    names = tuple(name.replace("#", str(i)) for i in range(count)) if "stack" in rule else (name,)
    shape = tuple(int(evaluated(s, constants)) for s in rule["shape"]) if "shape" in rule else None
    taken = {int(axis): _taken(what, constants) for axis, what in rule.get("take", {}).items()}
    index = tuple(taken.get(axis, slice(None)) for axis in range(max(taken, default=-1) + 1))
    order = rule.get("transpose") or None
    axes = tuple(reversed(range(len(slot)))) if order is True else tuple(order) if order else None
    return Part(names, slot, int(rule.get("axis", 0)), shape, index, axes)


def _taken(what: Any, constants: Mapping[str, Any]) -> int | slice:
    if isinstance(what, list):
        start, stop = (int(evaluated(w, constants)) for w in what)
        return slice(start, stop)
    return int(evaluated(what, constants))
