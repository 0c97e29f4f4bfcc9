"""Optional packages, imported when they are first needed."""

from importlib import import_module
from typing import Any

from .errors import MissingDependency

EXTRAS = {"tokenizers": "hf", "peft": "peft", "transformers": "inplace", "matplotlib": "plot"}  # others: `gemma`


def require(package: str) -> Any:
    """Import and return an optional package.

    Raises:
        MissingDependency: it is not installed; the message holds the command that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"the package {package} is needed and cannot be imported ({error}). "
            f'Install it with: pip install "blockkit-patch[{EXTRAS.get(package, "gemma")}]"'
        ) from error
