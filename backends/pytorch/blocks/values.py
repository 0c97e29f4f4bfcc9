"""What the translation knows of a value of an exported program, and what it gives: taps, and how parameters lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from blockkit.graph.graph import Graph
from blockkit.graph.ops import Op

from ..calling.token_rows import rows_of

STREAM = "stream"


@dataclass(frozen=True)
class Tap:
    """Where the program reads parameters: what a run of the model itself can show.

    Attributes:
        parameters: those that one call reads, by name in the block.
        signals: the graph's names of the other values that it reads, each with its token axis.
        output: the graph's name of what it gives, with its token axis; without a name where it gives no rows.
        by_row: whether every token's vector lies together in what it gives, so that each can have its own change.
    """

    parameters: frozenset[str]
    signals: tuple[tuple[str, int], ...]
    output: tuple[str, int]
    by_row: bool = True


@dataclass(frozen=True, eq=False)
class Derived:
    """A known value that the program makes of parameters, buffers and numbers alone, before it meets the stream.

    Attributes:
        nodes: the operations that make it, in order.
        reads: the parameters and buffers that they read, by name in the block.
        fixed: other values that they read.
        result: the operation that gives it.
        ones: parameters that count as ones in it, since the graph multiplies by them later.
        spread: the shape to which it is broadcast, and the token axis in that, for a vector; None for a matrix.
    """

    nodes: tuple[fx.Node, ...]
    reads: Mapping[fx.Node, str]
    fixed: Mapping[fx.Node, Any]
    result: fx.Node
    ones: frozenset[str] = frozenset()
    spread: tuple[tuple[int, ...], int] | None = None

    def value(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The value for the tensors that the names stand for, in float32 on the CPU: a matrix, or one row."""
        found = dict(self.fixed)
        for node, name in self.reads.items():
            given = tensor(name).detach().cpu()
            given = given.float() if given.is_floating_point() else given
            found[node] = torch.ones_like(given) if name in self.ones else given
        with torch.no_grad():
            for node in self.nodes:
                args, kwargs = (fx.map_arg(a, found.__getitem__) for a in (node.args, node.kwargs))
                found[node] = node.target(*args, **kwargs)
        value: Tensor = found[self.result]
        return value if self.spread is None else rows_of(value.broadcast_to(self.spread[0]), self.spread[1])[0]


@dataclass(frozen=True)
class Stored:
    """How a parameter of the graph lies in its tensor: a matrix as `[d_in, d_out]` if `transposed`.

    Attributes:
        derived: how it is worked out, where it is no tensor of the model's but made of some.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    derived: Derived | None = None


@dataclass(frozen=True)
class Translation:
    """A block as a graph.

    Attributes:
        taps: every call that reads parameters together with a signal, in order.
        stored: how the graph's parameters lie in their tensors.
    """

    graph: Graph
    taps: tuple[Tap, ...]
    stored: Mapping[str, Stored]


@dataclass(frozen=True)
class Known:
    """A value that is rows: the graph's name for it, its token axis, and a number added that has no node yet."""

    name: str
    axis: int
    shift: float = 0.0


@dataclass(frozen=True)
class Constant:
    """A value that no token's vector is part of.

    Attributes:
        of: the parameters that it depends on.
        given: whether it depends on the call's further arguments (positions, masks).
    """

    of: tuple[str, ...] = ()
    given: bool = False


class Raw:
    """A value that depends on the stream and is no rows."""


Form = Known | Constant | Raw


@dataclass(frozen=True)
class Proposal:
    """What an operation may be, to be held against numbers.

    Attributes:
        steps: primitives in order, each with its arguments and a name; the argument `#i` is the i-th one's result.
        base: the rows that `shift` is added to, where there are no steps.
        shift: a number added to the last result.
        stored: how the parameters lie that the steps read.
    """

    steps: tuple[tuple[Op, tuple[str, ...], str], ...] = ()
    base: str = ""
    shift: float = 0.0
    stored: Mapping[str, Stored] = field(default_factory=dict)


def rows_in_place(tensor: Tensor, stored: Stored) -> Tensor:
    """A parameter's tensor as the graph sees it: `[d_out, d_in]` or `[width]`, a view of it."""
    if stored.transposed:
        return tensor.reshape(stored.shape[::-1]).t()
    return tensor.reshape(stored.shape)
