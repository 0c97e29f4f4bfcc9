"""Shape checks that the mixing operations share."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import BadInput
from ..ops import Argument, Shape, show_shape


def check_count(kind: str, args: Sequence[Argument], names: Sequence[str], optional: int = 0) -> None:
    """There is an argument for every name; the last `optional` ones may be left out.

    Raises:
        BadInput: too few or too many.
    """
    if not len(names) - optional <= len(args) <= len(names):
        raise BadInput(f"{kind} takes {', '.join(names)}; got {len(args)} arguments")


def check_shape(kind: str, name: str, argument: Argument, shape: Shape) -> None:
    """The argument has that shape.

    Raises:
        BadInput: it has another.
    """
    if argument.shape != shape:
        raise BadInput(f"{kind}: {name} must have shape {show_shape(shape)}, got {show_shape(argument.shape)}")


def check_matrix(kind: str, name: str, argument: Argument) -> None:
    """The argument is a matrix.

    Raises:
        BadInput: it is a vector.
    """
    if len(argument.shape) != 2:
        raise BadInput(f"{kind}: {name} must be a matrix, got {show_shape(argument.shape)}")
