"""The array protocol in Keras 3 operations; where a backend has a better primitive, that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops

Array = Any
Fn = TypeVar("Fn", bound=Callable[..., Any])


class KerasArrays:
    """See `blockkit.graph.arrays.Arrays`. Tensors are the Keras backend's own."""

    def __init__(self) -> None:
        self.name = str(keras.backend.backend())

    def asarray(self, value: Any, dtype: str) -> Array:
        return ops.convert_to_tensor(value, dtype=dtype)

    def to_numpy(self, value: Array) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(value))

    def cast(self, value: Array, dtype: str) -> Array:
        return value if self.dtype_of(value) == dtype else ops.cast(value, dtype)

    def dtype_of(self, value: Array) -> str:
        return str(keras.backend.standardize_dtype(value.dtype))

    def linear(self, z: Array, weight: Array) -> Array:
        """z W^T without a transposed copy of W."""
        if self.name == "torch":
            from torch.nn.functional import linear

            return linear(z, weight)
        if self.name == "tensorflow":
            import tensorflow as tf

            return tf.linalg.matmul(z, weight, transpose_b=True)
        return ops.einsum("ti,oi->to", z, weight)

    def matmul(self, a: Array, b: Array) -> Array:
        return a @ b  # ops.matmul narrows float64 on PyTorch

    def transpose(self, value: Array, axes: Sequence[int]) -> Array:
        return ops.transpose(value, axes)

    def reshape(self, value: Array, shape: Sequence[int]) -> Array:
        return ops.reshape(value, tuple(shape))

    def concatenate(self, values: Sequence[Array], axis: int) -> Array:
        return ops.concatenate(list(values), axis=axis)

    def take_rows(self, table: Array, rows: Array) -> Array:
        return ops.take(table, rows, axis=0)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        return ops.where(condition, a, b)

    def mean(self, value: Array) -> Array:
        return ops.mean(value, axis=-1, keepdims=True)

    def rsqrt(self, value: Array) -> Array:
        return ops.rsqrt(value)

    def exp(self, value: Array) -> Array:
        return ops.exp(value)

    def tanh(self, value: Array) -> Array:
        return ops.tanh(value)

    def erf(self, value: Array) -> Array:
        return ops.erf(value)

    def cos(self, value: Array) -> Array:
        return ops.cos(value)

    def sin(self, value: Array) -> Array:
        return ops.sin(value)

    def maximum(self, value: Array, bound: float) -> Array:
        return ops.where(value > bound, value, ops.full_like(value, bound))  # ops.maximum narrows it, too

    def sigmoid(self, value: Array) -> Array:
        return ops.sigmoid(value)

    def softplus(self, value: Array) -> Array:
        return ops.softplus(value)

    def softmax(self, value: Array) -> Array:
        shifted = ops.exp(value - ops.max(value, axis=-1, keepdims=True))  # ops.softmax warns of rows of one
        return shifted / ops.sum(shifted, axis=-1, keepdims=True)

    def top_k(self, value: Array, k: int) -> Array:
        """Ones where one of the k largest of the last axis stands, else zeros."""
        _, places = ops.top_k(value, k)
        return ops.sum(ops.one_hot(places, int(value.shape[-1]), dtype=value.dtype), axis=-2)

    def scan(self, step: Callable[[Any, Any], tuple[Any, Array]], start: Any, rows: Sequence[Array]) -> Array:
        """Steps through rows `[n, ...]`, carrying a state; all results, `[n, ...]`."""
        if self.name == "tensorflow":
            return _scan_on_tensorflow(step, start, tuple(rows))
        return ops.scan(step, start, tuple(rows))[1]

    def each(self, function: Callable[[tuple[Array, ...]], Array], values: tuple[Array, ...]) -> Array:
        """The function of every slice along the first axis, stacked; outside the `Arrays` protocol."""
        if self.name == "tensorflow":
            import tensorflow as tf

            if tf.executing_eagerly():  # vectorized_map would trace the function anew at every call
                return ops.stack([function(parts) for parts in zip(*map(ops.unstack, values), strict=True)])
        return ops.vectorized_map(function, values)

    def jit(self, function: Fn) -> Fn:
        """Compiles where the backend can: XLA on JAX, a graph on TensorFlow; PyTorch runs as it is."""
        if self.name == "jax":
            import jax

            return jax.jit(function)
        if self.name == "tensorflow":
            import tensorflow as tf

            return tf.function(function, autograph=False)
        return _without_gradients(function)


def _scan_on_tensorflow(step: Callable[[Any, Any], tuple[Any, Array]], start: Any, rows: tuple[Array, ...]) -> Array:
    """As `KerasArrays.scan`: Keras's own gives the results the shapes of the state, and fails where they differ."""
    import tensorflow as tf

    count = int(rows[0].shape[0])
    state, first = step(start, tuple(r[0] for r in rows))
    found = tf.TensorArray(first.dtype, size=count, element_shape=first.shape).write(0, first)

    def body(i: Array, state: Any, found: Any) -> tuple[Array, Any, Any]:
        state, y = step(state, tuple(r[i] for r in rows))
        return i + 1, state, found.write(i, y)

    return tf.while_loop(lambda i, *_: i < count, body, (tf.constant(1), state, found))[2].stack()


def _without_gradients(function: Fn) -> Fn:
    import functools

    import torch

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return run  # type: ignore[return-value]
