"""The array protocol: the few primitives in which every operation is written, once.

An `Arrays` value is passed in wherever numbers are touched; it is the whole of what a backend has
to supply to run graphs. NumPy's implementation is here. Axis vocabulary of all docstrings:
`tokens` (rows of a packed sequence), `d_model` (residual stream), `d_in`, `d_out`, `heads`,
`head_dim`, `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..errors import BadInput

Array = Any  # whatever the backend computes with
Fn = TypeVar("Fn", bound=Callable[..., Any])


class Arrays(Protocol):
    """Primitives over a backend's arrays. Arithmetic operators and slicing work on the arrays themselves."""

    name: str

    def asarray(self, value: Any, dtype: str) -> Array: ...
    def to_numpy(self, value: Array) -> np.ndarray: ...
    def cast(self, value: Array, dtype: str) -> Array: ...
    def dtype_of(self, value: Array) -> str: ...
    def linear(self, z: Array, weight: Array) -> Array: ...
    def matmul(self, a: Array, b: Array) -> Array: ...
    def transpose(self, value: Array, axes: Sequence[int]) -> Array: ...
    def reshape(self, value: Array, shape: Sequence[int]) -> Array: ...
    def concatenate(self, values: Sequence[Array], axis: int) -> Array: ...
    def take_rows(self, table: Array, rows: Array) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def mean(self, value: Array) -> Array: ...
    def rsqrt(self, value: Array) -> Array: ...
    def exp(self, value: Array) -> Array: ...
    def tanh(self, value: Array) -> Array: ...
    def erf(self, value: Array) -> Array: ...
    def cos(self, value: Array) -> Array: ...
    def sin(self, value: Array) -> Array: ...
    def maximum(self, value: Array, bound: float) -> Array: ...
    def sigmoid(self, value: Array) -> Array: ...
    def softplus(self, value: Array) -> Array: ...
    def softmax(self, value: Array) -> Array: ...
    def top_k(self, value: Array, k: int) -> Array: ...
    def scan(self, step: Callable[[Any, Any], tuple[Any, Array]], start: Any, rows: Sequence[Array]) -> Array: ...
    def jit(self, function: Fn) -> Fn: ...


class NumpyArrays:
    """The reference implementation, in whatever precision the arrays have."""

    name = "numpy"

    def asarray(self, value: Any, dtype: str) -> np.ndarray:
        return np.asarray(value, dtype=dtype)

    def to_numpy(self, value: np.ndarray) -> np.ndarray:
        return value

    def cast(self, value: np.ndarray, dtype: str) -> np.ndarray:
        return value.astype(dtype, copy=False)

    def dtype_of(self, value: np.ndarray) -> str:
        return str(value.dtype)

    def linear(self, z: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """`z [tokens, d_in]`, `weight [d_out, d_in]` -> `[tokens, d_out]`."""
        return z @ weight.T

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b

    def transpose(self, value: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        return np.transpose(value, axes)

    def reshape(self, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return np.reshape(value, tuple(shape))

    def concatenate(self, values: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(list(values), axis=axis)

    def take_rows(self, table: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.asarray(table[rows])

    def where(self, condition: np.ndarray, a: Any, b: Any) -> np.ndarray:
        return np.where(condition, a, b)

    def mean(self, value: np.ndarray) -> np.ndarray:
        """Over the last axis, which is kept."""
        return np.mean(value, axis=-1, keepdims=True)

    def rsqrt(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(1 / np.sqrt(value))

    def exp(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(value))

    def tanh(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.tanh(value))

    def erf(self, value: np.ndarray) -> np.ndarray:
        import math

        return np.asarray(np.frompyfunc(math.erf, 1, 1)(value)).astype(value.dtype)

    def cos(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.cos(value))

    def sin(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.sin(value))

    def maximum(self, value: np.ndarray, bound: float) -> np.ndarray:
        return np.asarray(np.maximum(value, value.dtype.type(bound)))

    def sigmoid(self, value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # 1 / inf is the zero that is meant
            return np.asarray(1 / (1 + np.exp(-value)))

    def softplus(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.logaddexp(value.dtype.type(0), value))

    def softmax(self, value: np.ndarray) -> np.ndarray:
        shifted = np.exp(value - value.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))

    def top_k(self, value: np.ndarray, k: int) -> np.ndarray:
        """Ones where one of the k largest of the last axis stands (the first of equals), else zeros."""
        order = np.argsort(-value, axis=-1, kind="stable")[..., :k]
        chosen = np.zeros_like(value)
        np.put_along_axis(chosen, order, 1, axis=-1)
        return chosen

    def scan(self, step: Callable[[Any, Any], tuple[Any, Array]], start: Any, rows: Sequence[Array]) -> np.ndarray:
        """Steps through rows `[n, ...]`, carrying a state: `state, y = step(state, row of each)`; all y, `[n, ...]`."""
        state, out = start, []
        for row in zip(*rows, strict=True):
            state, y = step(state, row)
            out.append(y)
        return np.stack(out)

    def jit(self, function: Fn) -> Fn:
        return function


class NarrowArrays(NumpyArrays):
    """NumPy in 16 bits: every operation works in float32 and rounds its result, as accelerators do."""

    def linear(self, z: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self.matmul(z, weight.T)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype.itemsize > 2 or b.dtype.itemsize > 2:
            return a @ b
        return np.asarray(a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)

    def mean(self, value: np.ndarray) -> np.ndarray:
        return np.mean(value, axis=-1, keepdims=True, dtype=np.float32).astype(value.dtype)

    def softmax(self, value: np.ndarray) -> np.ndarray:
        return super().softmax(value.astype(np.float32)).astype(value.dtype)


def numpy_arrays(dtype: str) -> NumpyArrays:
    """The NumPy implementation for a dtype; with it, NumPy knows `bfloat16` by name.

    Raises:
        BadInput: a dtype that it does not have.
    """
    if dtype in ("float32", "float64"):
        return NumpyArrays()
    if dtype not in ("bfloat16", "float16"):
        raise BadInput(f"the numpy backend runs in float32, float64, bfloat16 or float16, not {dtype}")
    import ml_dtypes  # noqa: F401, registers it

    return NarrowArrays()


def wide_dtype(dtype: str) -> str:
    """The dtype in which norms, rotations and softmax are computed for values of `dtype`."""
    return "float64" if dtype == "float64" else "float32"
