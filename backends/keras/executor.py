"""The executor of Algorithm 1 over a Keras model's own variables."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from blockkit.absorbing.executor import Executor
from blockkit.checkpoint.model import Model
from blockkit.errors import BadInput

from .arrays import KerasArrays
from .model import CausalLM, build, load_weights

DTYPES = ("float32", "float64", "bfloat16", "float16")


def executor(model: CausalLM) -> Executor:
    """Runs the model block by block, with its weights as they are now (shared, not copied)."""
    parameters = {slot: _tensor(v) for slot, v in model.slots.items()}
    return Executor(model.architecture, KerasArrays(), parameters, model.compute_dtype)


def _tensor(variable: Any) -> Any:
    value = ops.convert_to_tensor(variable)
    return value.detach() if hasattr(value, "detach") else value


def _open(model: Model, dtype: str, backend: str) -> Executor:
    running = str(keras.backend.backend())
    if running != backend:
        raise BadInput(
            f"Keras is running on {running}, not {backend}: it chooses its backend once, when it is first imported. "
            f"Start Python with KERAS_BACKEND={backend}"
        )
    if dtype not in DTYPES:
        raise BadInput(f"the {backend} backend runs in {', '.join(DTYPES)}, not {dtype}")
    if backend == "jax" and dtype == "float64":
        import jax

        if not jax.config.jax_enable_x64:
            raise BadInput("JAX has float64 only when Python is started with JAX_ENABLE_X64=1")
    keras_model = build(model.architecture, dtype)
    load_weights(keras_model, model)
    return executor(keras_model)


def open_jax(model: Model, dtype: str = "float32") -> Executor:
    """A model on disk, on Keras with JAX; weights and activations in `dtype`.

    Raises:
        BadInput: Keras was imported with another backend, or has no such dtype.
    """
    return _open(model, dtype, "jax")


def open_tensorflow(model: Model, dtype: str = "float32") -> Executor:
    """A model on disk, on Keras with TensorFlow; weights and activations in `dtype`.

    Raises:
        BadInput: Keras was imported with another backend, or has no such dtype.
    """
    return _open(model, dtype, "tensorflow")


def open_torch(model: Model, dtype: str = "float32") -> Executor:
    """A model on disk, on Keras with PyTorch; weights and activations in `dtype`.

    Raises:
        BadInput: Keras was imported with another backend, or has no such dtype.
    """
    return _open(model, dtype, "torch")
