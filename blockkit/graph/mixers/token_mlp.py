"""MLP-Mixer's token mixing (arXiv 2105.01601): an MLP along the sequence, for a fixed number of places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..ops import FUNCTIONS, Argument, Shape, apply_function
from ..ops.mixing import MixingOp
from .checks import check_count, check_matrix, check_shape


@dataclass(frozen=True)
class TokenMLP(MixingOp):
    """Y = W_2 fn(W_1 X + b_1) + b_2 for the rows X `[places, width]`, the same for every channel.

    Arguments: the rows `[tokens, width]`; parameters `W_1 [hidden, places]`, `b_1 [hidden]`, `W_2 [places, hidden]`,
    `b_2 [places]`. A row's position says which place it takes; a place without a row counts as zero.
    """

    fn: str = "gelu"
    kind: ClassVar[str] = "token_mlp"

    def __post_init__(self) -> None:
        if self.fn not in FUNCTIONS:
            raise BadInput(f"{self.kind}: unknown activation {self.fn!r}; allowed are {', '.join(FUNCTIONS)}")

    @property
    def signals(self) -> int:
        return 1

    @property
    def sees_later(self) -> bool:
        return True

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[width]`; see `Op.infer`."""
        names = ("a signal", "W_1", "b_1", "W_2", "b_2")
        check_count(self.kind, args, names)
        check_matrix(self.kind, "W_1", args[1])
        hidden, places = args[1].shape
        shapes: list[Shape] = [(hidden,), (places, hidden), (places,)]
        for name, argument, shape in zip(names[2:], args[2:], shapes, strict=True):
            check_shape(self.kind, name, argument, shape)
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        rows, up, up_bias, down, down_bias = args
        n, hidden, places = int(rows.shape[0]), int(up.shape[0]), int(up.shape[1])
        if n > places:
            raise BadInput(f"{self.kind} has {places} places, got a sequence of {n} tokens")
        mine = xp.take_rows(xp.transpose(up, (1, 0)), positions)  # [n, hidden]
        hiddens = xp.matmul(xp.transpose(mine, (1, 0)), rows) + xp.reshape(up_bias, (hidden, 1))
        out = xp.matmul(xp.take_rows(down, positions), apply_function(xp, self.fn, hiddens))
        return out + xp.reshape(xp.take_rows(xp.reshape(down_bias, (places, 1)), positions), (n, 1))
