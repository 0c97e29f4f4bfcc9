"""The errors, from their classes."""

from __future__ import annotations

import inspect

from blockkit import errors as kinds

from .markdown import table


def errors() -> str:
    """One row a class of errors: its exit status and what it means."""
    classes = [c for _, c in inspect.getmembers(kinds, inspect.isclass) if issubclass(c, kinds.BlockkitError)]
    rows = [
        (f"`{c.__name__}`", f"`{c.__bases__[0].__name__}`", str(c.exit_status), inspect.getdoc(c).split("\n\n")[0])  # type: ignore[union-attr]
        for c in sorted(classes, key=lambda c: len(c.__mro__))
    ]
    return table(("error", "is a", "exit status", "what it means"), rows)
