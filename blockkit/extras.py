"""Optional packages, imported when they are first needed."""

from importlib import import_module
from typing import Any

from .errors import MissingDependency

EXTRAS = {  # others: `gemma`
    "tokenizers": "hf", "peft": "peft", "transformers": "inplace", "matplotlib": "plot", "torch": "inplace",
    "keras": "jax",
}  # fmt: skip
HINTS = {
    "keras": " (or torch, tensorflow in its place). Keras needs the framework that KERAS_BACKEND names, tensorflow "
    "where it names none: set it to one that is installed before Keras is first imported",
}


def require(package: str) -> Any:
    """Import and return an optional package.

    Raises:
        MissingDependency: it is not installed; the message holds the command that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise missing(package, error) from error


def reason(error: BaseException) -> BaseException:
    """What really could not be imported, where a message of ours has been made of it already."""
    return error.__cause__ if isinstance(error, MissingDependency) and error.__cause__ else error


def missing(package: str, error: ImportError) -> MissingDependency:
    """The error that says which extra brings a package."""
    return MissingDependency(
        f"the package {package} is needed and cannot be imported ({error}). "
        f'Install it with: pip install "blockkit-patch[{EXTRAS.get(package, "gemma")}]"{HINTS.get(package, "")}'
    )
