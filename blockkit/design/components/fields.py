"""What the fields of a declaration may hold, asked of its annotations when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import BadInput

SIGNALS = ("input", "inputs")  # what a component reads: components while a block is written, names in a Block


def require_fields(declared: Any) -> None:
    """Refuses a dataclass one of whose fields holds what its annotation does not allow.

    Annotations that say more than plain types do are not asked, nor those that cannot be resolved.

    Raises:
        BadInput: with the field, what it holds and what it may hold.
    """
    cls: Any = type(declared)
    hints = _hints(cls)
    for f in fields(declared):
        value = getattr(declared, f.name)
        if f.name not in SIGNALS and f.name in hints and not _fits(value, hints[f.name]):
            allowed = _words(hints[f.name])
            raise BadInput(f"{cls.__name__}: {f.name} must be {allowed}, got {_shown(value)}{_instead(value)}")


def require_signal(value: Any, reader: str, component: type) -> None:
    """Refuses what is neither a component nor a component's name.

    Args:
        reader: who reads it, in words.
        component: the base of all components.

    Raises:
        BadInput: with what to write instead.
    """
    if not isinstance(value, component | str):
        raise BadInput(f"{reader} {_shown(value)}; expected another component or stream(){_instead(value)}")


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.80}"


def _instead(value: Any) -> str:
    """What to write in place of a class."""
    if not isinstance(value, type):
        return ""
    first = "stream(), ..." if hasattr(value, "lower") else "..."
    return f". Give an instance of it: {value.__name__}({first})"


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotations of a class, by field; none where they name what cannot be found."""
    try:
        return get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, args[0]) for v in value)
    if origin is not None and isinstance(origin, type):
        if not isinstance(value, origin):
            return False
        pairs = value.items() if isinstance(value, Mapping) and len(args) == 2 else ()
        return all(_fits(v, hint) for pair in pairs for v, hint in zip(pair, args, strict=True))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and hint is not Any else True


def _words(hint: Any) -> str:
    """An annotation in words: `a whole number or a name`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of which each is {_words(args[0])}"
    if origin is not None:
        each = f" of which each is {_words(args[-1])}" if len(args) == 2 else ""
        return f"a {origin.__name__.lower()}{each}"
    plain = {int: "a whole number", float: "a number", str: "a name", bool: "true or false", NoneType: "None"}
    return plain.get(hint, f"an instance of {getattr(hint, '__name__', hint)}")
