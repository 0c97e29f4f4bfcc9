"""Keras 3: a graph becomes a real `keras.Model`, run on JAX, TensorFlow or PyTorch.

Keras chooses its backend when it is first imported, by the environment variable KERAS_BACKEND. This
package never sets it; `open_jax`, `open_tensorflow` and `open_torch` refuse the wrong one.
"""

from blockkit.extras import missing

try:
    from .executor import executor, open_jax, open_tensorflow, open_torch
    from .model import build, load_weights
except ImportError as error:
    raise missing("keras", error) from error

__all__ = ["build", "executor", "load_weights", "open_jax", "open_tensorflow", "open_torch"]
