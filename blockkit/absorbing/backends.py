"""Opening a model on a backend: the entry points of the group `blockkit.backends`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from ..checkpoint.dtypes import NARROW
from ..checkpoint.model import Model
from ..errors import BadInput, MissingDependency
from ..extras import reason
from .executor import Executor

GROUP = "blockkit.backends"
PREFERRED = ("jax", "torch", "tensorflow")  # by what is installed; then the reference


def backends() -> tuple[str, ...]:
    """The names of all backends that are registered, installed or not."""
    return tuple(sorted(e.name for e in entry_points(group=GROUP)))


def default_backend() -> str:
    """What KERAS_BACKEND says; else the first of jax, torch and tensorflow that is installed with Keras; else numpy."""
    if find_spec("keras") is not None:
        for name in dict.fromkeys((os.environ.get("KERAS_BACKEND", ""), *PREFERRED)):
            if name in PREFERRED and find_spec(name) is not None:
                return name
    return "numpy"


def running_backend() -> str:
    """What Keras runs on in this Python, or will by KERAS_BACKEND; numpy where nobody has said: only the command line
    may choose for Keras, which does it once."""
    keras = sys.modules.get("keras")
    name = str(keras.backend.backend()) if keras is not None else os.environ.get("KERAS_BACKEND", "")
    return name if name in PREFERRED and find_spec("keras") is not None and find_spec(name) is not None else "numpy"


def open_executor(model: Model, backend: str, dtype: str = "float32") -> Executor:
    """The model, ready to run on a backend.

    Raises:
        BadInput: no such backend, or a dtype that it does not have.
        MissingDependency: its framework is not installed; the message holds the install line.
    """
    found = {e.name: e for e in entry_points(group=GROUP)}
    if backend not in found:
        raise BadInput(f"no backend {backend!r}; there are {', '.join(sorted(found))}")
    try:
        opener = found[backend].load()
    except ImportError as error:
        needs = f"the {backend} backend cannot be imported ({reason(error)})"
        if backend not in PREFERRED:
            raise MissingDependency(f"{needs}; it comes from the package {_package(found[backend])}") from None
        raise MissingDependency(f'{needs}. Install it with: pip install "blockkit-patch[{backend}]"') from None
    executor: Executor = opener(model, dtype)
    if model.stored_dtypes(model.parts) & NARROW.keys():
        executor.written = model.written
    return executor


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module
