"""A Keras model's own variables as parameters in the graph's orientation: derived anew at each use, kept nowhere."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from blockkit.errors import BadInput


@dataclass(frozen=True)
class Stored:
    """One variable and which of its axes are rows and which are columns of y = W z; a vector has no columns.

    Attributes:
        rows: the axes that the layer gives, in the order in which they make up d_out.
        columns: the axes that it sums over, in the order in which they make up d_in.
    """

    variable: Any
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()

    @staticmethod
    def vector(variable: Any) -> Stored:
        """A scale or a bias, whatever its axes."""
        return Stored(variable, tuple(range(len(variable.shape))))

    @staticmethod
    def matrix(variable: Any, equation: str = "i,io->o") -> Stored:
        """A kernel that is used as `equation` (of `ops.einsum`) says: its second operand is the kernel.

        Kernel axes that the result has are rows, in the result's order; the others are columns, in the input's.
        """
        (given, kernel), result = equation.split("->")[0].split(","), equation.split("->")[1]
        rows = tuple(kernel.index(axis) for axis in result if axis in kernel)
        columns = tuple(kernel.index(axis) for axis in given if axis in kernel and axis not in result)
        if sorted(rows + columns) != list(range(len(variable.shape))):
            raise BadInput(f"{variable.path}: the equation {equation!r} is no matrix product")
        return Stored(variable, rows, columns)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, rows first."""
        return tuple(int(self.variable.shape[axis]) for axis in self.rows + self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[d_out, d_in]` or `[width]`."""
        rows, columns = math.prod(self.sizes[: len(self.rows)]), math.prod(self.sizes[len(self.rows) :])
        return (rows, columns) if self.columns else (rows,)

    @property
    def transposed(self) -> bool:
        """Whether the stored array is `[d_in, d_out]` as it lies."""
        return bool(self.columns) and self.columns + self.rows == tuple(range(len(self.sizes)))

    def tensor(self, dtype: str) -> Any:
        """The values as they are now, in the graph's orientation: a view where the backend has views."""
        value = ops.convert_to_tensor(self.variable)
        value = value.detach() if hasattr(value, "detach") else value
        if self.rows + self.columns != tuple(range(len(self.sizes))):
            value = ops.transpose(value, self.rows + self.columns)
        return ops.cast(ops.reshape(value, self.shape), dtype)

    def read(self) -> np.ndarray:
        """The values as they are now, in the graph's orientation, on the host."""
        return host(self.variable).transpose(self.rows + self.columns).reshape(self.shape)

    def laid_out(self, value: np.ndarray) -> np.ndarray:
        """Values in the graph's orientation as the variable holds them."""
        return np.ascontiguousarray(value.reshape(self.sizes).transpose(np.argsort(self.rows + self.columns)))


class Parameters(Mapping[str, Any]):
    """Every slot's tensor, derived from its variable when it is asked for."""

    def __init__(self, stored: Mapping[str, Stored], dtype: str) -> None:
        self.stored, self.dtype = stored, dtype

    def __getitem__(self, slot: str) -> Any:
        return self.stored[slot].tensor(self.dtype)

    def __contains__(self, slot: object) -> bool:
        return slot in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def host(variable: Any) -> np.ndarray:
    """A copy of a variable's values; of bfloat16, in float32 where NumPy has none."""
    return np.array(ops.convert_to_numpy(variable))


def without_gradients() -> contextlib.AbstractContextManager[Any]:
    """Runs in it record nothing for a backward pass."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def names(model: Any, stored: Mapping[str, Stored]) -> dict[str, str]:
    """The name of every slot's variable: its path, the same in every process.

    Keras numbers layers without a name of their own as they are made (`sparse_moe_block_3`); the number is left out.

    Raises:
        BadInput: two variables have one name.
    """
    numbered = {
        layer.name: base
        for layer in model._flatten_layers()
        if re.fullmatch((base := _snake_case(type(layer).__name__)) + r"(_\d+)?", layer.name)
    }
    found = {
        slot: "/".join(numbered.get(part, part) for part in s.variable.path.split("/")) for slot, s in stored.items()
    }
    if len(set(found.values())) < len(found):
        twice = next(name for name in found.values() if list(found.values()).count(name) > 1)
        raise BadInput(f"{model.name}: two variables are named {twice}; give the layers that hold them names")
    return found


def _snake_case(name: str) -> str:
    """As Keras makes a layer's name of its class's."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name)))
    return apart.lower()
