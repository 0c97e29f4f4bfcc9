"""The primitive operations: shape rule, forward meaning, laws and reach of each, in one place.

A value is a vector per token; an executor holds `[tokens, width]` for it. Parameters are matrices
`[d_out, d_in]` or vectors `[width]`. An operation is a frozen dataclass of its attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import Array, Arrays, wide_dtype
from .errors import BadInput
from .laws import (
    Law,
    direction_law,
    divide_law,
    invert_law,
    limited_law,
    place_law,
    scale_law,
    shift_law,
    through_law,
    weight_law,
)
from .reach import Reach, mapped, product_of, scaled, sum_of
from .sizes import Size

if TYPE_CHECKING:
    from .layout import Layout

Shape = tuple[Size, ...]


class Vanish(IntEnum):
    """Which zeros a value has, not by chance but for whole regions of contexts."""

    NEVER = 0
    HOLES = 1  # some coordinates, never all
    ALL = 2  # possibly all


@dataclass(frozen=True)
class Argument:
    """What an operation knows of an argument when it is built: its shape, and whether it is a parameter."""

    shape: Shape
    parameter: bool

    @property
    def width(self) -> Size:
        return self.shape[0]


class Op:
    """Base of the operations. `kind` is the operation's name in raw graphs."""

    kind: ClassVar[str] = ""
    mixing: ClassVar[bool] = False  # looks at other tokens: the only way in for the context
    injective: ClassVar[bool] = False  # different arguments give different results

    def infer(self, args: Sequence[Argument]) -> Shape:
        """The result's shape.

        Raises:
            BadInput: the arguments do not fit; the message says what is allowed.
        """
        raise NotImplementedError

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        """The value, `[tokens, width]`, of arguments `[tokens, width]` or parameters."""
        raise NotImplementedError

    def law(self, position: int, args: Sequence[Argument]) -> Law | None:
        """How to solve for the argument at `position`; None where the operation says nothing."""
        return None

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        """An upper bound on the results when the arguments move within `moved`, each on its own."""
        return Reach.POINT if all(r is Reach.POINT for r in moved) else Reach.ALL

    def fills(self, filled: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        """What contexts make of the result when they make `filled` of the arguments; POINT where that is unknown."""
        return self.reach(filled, args)

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        """Which zeros whole regions of contexts give, when the arguments have those of `args`."""
        return max(args, default=Vanish.NEVER)


def _same_width(kind: str, args: Sequence[Argument], least: int) -> Shape:
    if len(args) < least:
        raise BadInput(f"{kind} takes at least {least} arguments, got {len(args)}")
    if all(a.parameter for a in args):
        raise BadInput(f"{kind} takes at least one signal, got parameters only")
    for a in args:
        if len(a.shape) != 1:
            raise BadInput(f"{kind} takes vectors, got a matrix {show_shape(a.shape)}; use matmul")
        if a.width != args[0].width:
            shapes = ", ".join(show_shape(a.shape) for a in args)
            raise BadInput(f"{kind} takes arguments of one width, got {shapes}")
    return args[0].shape


def _one_signal(kind: str, args: Sequence[Argument]) -> Shape:
    if len(args) != 1 or args[0].parameter:
        raise BadInput(f"{kind} takes exactly one signal, got {len(args)} argument(s)")
    return args[0].shape


def show_shape(shape: Shape) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


@dataclass(frozen=True)
class Add(Op):
    """y = a + b + ..., of signals or vectors of parameters."""

    kind: ClassVar[str] = "add"
    injective: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _same_width(self.kind, args, 2)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        total = args[0] + args[1]
        for a in args[2:]:
            total = total + a
        return total

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return shift_law(self.kind, args[position].parameter)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        total = moved[0]
        for r in moved[1:]:
            total = sum_of(total, r)
        return total

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return min(args)


@dataclass(frozen=True)
class Multiply(Op):
    """y = a * b; with an offset c, y = a * (c + b) (Gemma's norms have c = 1)."""

    kind: ClassVar[str] = "multiply"
    injective: ClassVar[bool] = True  # by a vector without zeros
    offset: float = 0.0

    def infer(self, args: Sequence[Argument]) -> Shape:
        if len(args) != 2:
            raise BadInput(f"multiply takes exactly 2 arguments, got {len(args)}")
        return _same_width(self.kind, args, 2)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return args[0] * (args[1] + self.offset if self.offset else args[1])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return divide_law(self.kind, 1 - position, self.offset)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        second = sum_of(moved[1], Reach.POINT)
        return product_of(moved[0], second)

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        first, second = args[0], Vanish.NEVER if self.offset else args[1]
        return Vanish.ALL if first and second else max(first, second)  # holes may complement each other


@dataclass(frozen=True)
class Scale(Op):
    """y = alpha a for a known number alpha."""

    alpha: float
    kind: ClassVar[str] = "scale"

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return self.alpha != 0

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return args[0] * self.alpha

    def law(self, position: int, args: Sequence[Argument]) -> Law | None:
        return scale_law(self.alpha)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return scaled(moved[0], self.alpha)


@dataclass(frozen=True)
class MatMul(Op):
    """y = W z, with W `[d_out, d_in]`."""

    kind: ClassVar[str] = "matmul"

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[d_out]`; see `Op.infer`."""
        if len(args) != 2 or args[0].parameter or len(args[1].shape) != 2 or len(args[0].shape) != 1:
            raise BadInput('matmul takes a signal and a matrix, as {"args": ["z", "W"]} for y = W z')
        rows, columns = args[1].shape
        if columns != args[0].width:
            shown = show_shape(args[1].shape)
            raise BadInput(
                f"matmul: the matrix {shown} (d_out, d_in) takes width {columns}, "
                f"but its signal has width {args[0].width}"
            )
        return (rows,)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return xp.linear(args[0], args[1])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return weight_law() if position == 1 else through_law()

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        rows, columns = args[1].shape
        return mapped(moved[0], rows.at_most(columns)) if moved[1] is Reach.POINT else Reach.ALL

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] is Vanish.ALL else Vanish.NEVER


@dataclass(frozen=True)
class RMSNorm(Op):
    """y = h / sqrt(mean(h^2) + eps), without parameters."""

    eps: float = 1e-6
    kind: ClassVar[str] = "rms_norm"

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return self.eps > 0

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        h = xp.cast(args[0], wide_dtype(dtype := xp.dtype_of(args[0])))
        return xp.cast(h * xp.rsqrt(xp.mean(h * h) + self.eps), dtype)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return direction_law(self.kind, "it has no parameters and its results keep mean(y^2) below 1")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SPHERE


@dataclass(frozen=True)
class LayerNorm(Op):
    """y = (h - mean h) / sqrt(var h + eps), without parameters."""

    eps: float = 1e-5
    kind: ClassVar[str] = "layer_norm"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        h = xp.cast(args[0], wide_dtype(dtype := xp.dtype_of(args[0])))
        h = h - xp.mean(h)
        return xp.cast(h * xp.rsqrt(xp.mean(h * h) + self.eps), dtype)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        limit = "it has no parameters and its results keep mean(y) = 0 and mean(y^2) below 1"
        return limited_law(self.kind, Reach.SPHERE, limit)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SPHERE

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] is Vanish.ALL else Vanish.NEVER


@dataclass(frozen=True)
class Function:
    """What the planner needs to know of an activation, beside its values."""

    reach: Reach
    limit: str
    bijective: bool = False
    injective: bool = False
    flat: bool = False  # exactly zero on a whole half-line


FUNCTIONS: dict[str, Function] = {
    "identity": Function(Reach.ALL, "", bijective=True, injective=True),
    "leaky_relu": Function(Reach.ALL, "", bijective=True, injective=True),
    "relu": Function(Reach.NON_NEGATIVE, "its results are never negative", flat=True),
    "relu2": Function(Reach.NON_NEGATIVE, "its results are never negative", flat=True),
    "gelu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "gelu_tanh": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "quick_gelu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.17)"),
    "silu": Function(Reach.NON_NEGATIVE, "its results are bounded below (by -0.28)"),
    "tanh": Function(Reach.BALL, "its results stay between -1 and 1", injective=True),
    "sigmoid": Function(Reach.BALL, "its results stay between 0 and 1", injective=True),
}
LEAK = 0.01


def apply_function(xp: Arrays, fn: str, u: Array) -> Array:
    """The activation `fn` of `u`, coordinate by coordinate."""
    match fn:
        case "identity":
            return u
        case "relu":
            return xp.maximum(u, 0.0)
        case "relu2":
            return xp.maximum(u, 0.0) * xp.maximum(u, 0.0)
        case "leaky_relu":
            return xp.maximum(u, 0.0) - LEAK * xp.maximum(-u, 0.0)
        case "silu":
            return u * xp.sigmoid(u)
        case "quick_gelu":
            return u * xp.sigmoid(1.702 * u)
        case "tanh":
            return xp.tanh(u)
        case "sigmoid":
            return xp.sigmoid(u)
        case "gelu":
            return 0.5 * u * (1 + xp.erf(u * 0.7071067811865476))
        case _:  # gelu_tanh
            return 0.5 * u * (1 + xp.tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))


@dataclass(frozen=True)
class Activation(Op):
    """y = fn(u), coordinate by coordinate."""

    fn: str
    kind: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        if self.fn not in FUNCTIONS:
            raise BadInput(f"activation: unknown fn {self.fn!r}; allowed are {', '.join(FUNCTIONS)}")

    @property
    def injective(self) -> bool:  # type: ignore[override]
        return FUNCTIONS[self.fn].injective

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return apply_function(xp, self.fn, args[0])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        known = FUNCTIONS[self.fn]
        if known.bijective:
            return invert_law(self.kind, self.fn)
        return limited_law(self.kind, known.reach, f"{self.fn}: {known.limit}")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        known = FUNCTIONS[self.fn]
        if moved[0] is Reach.POINT or known.bijective:
            return Reach.BALL if moved[0] in (Reach.SPHERE, Reach.SIMPLEX) else moved[0]
        return Reach.BALL if moved[0].bounded else known.reach

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        if FUNCTIONS[self.fn].flat:
            return Vanish.ALL
        return Vanish.NEVER if self.fn == "sigmoid" else args[0]


@dataclass(frozen=True)
class Softcap(Op):
    """y = cap tanh(u / cap)."""

    cap: float
    kind: ClassVar[str] = "softcap"
    injective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise BadInput(f"softcap: cap must be positive, got {self.cap}")

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return self.cap * xp.tanh(args[0] / self.cap)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.BALL, f"its results stay between -{self.cap:g} and {self.cap:g}")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.BALL


@dataclass(frozen=True)
class Softmax(Op):
    """y = softmax(u) over the coordinates of one token."""

    kind: ClassVar[str] = "softmax"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return _one_signal(self.kind, args)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return xp.softmax(args[0])

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.SIMPLEX, "its results are non-negative and sum to 1")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if moved[0] is Reach.POINT else Reach.SIMPLEX

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.NEVER


@dataclass(frozen=True)
class Concat(Op):
    """The arguments, one after the other; steering one part alone reaches that part only."""

    kind: ClassVar[str] = "concat"
    injective: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        if not args or any(a.parameter for a in args):
            raise BadInput("concat takes one or more signals, no parameters")
        total = Size.of(0)
        for a in args:
            total = total + a.width
        return (total,)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return xp.concatenate(args, axis=-1)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return place_law(self.kind)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        if all(r is moved[0] for r in moved):
            return Reach.BALL if moved[0].bounded and moved[0] is not Reach.POINT else moved[0]
        return Reach.BALL if all(r.bounded for r in moved) else Reach.PROPER

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.HOLES if any(args) and min(args) is not Vanish.ALL else min(args)


@dataclass(frozen=True)
class Slice(Op):
    """y = u[start:stop]."""

    start: Size
    stop: Size
    kind: ClassVar[str] = "slice"

    def infer(self, args: Sequence[Argument]) -> Shape:
        (width,) = _one_signal(self.kind, args)
        inside = self.start.at_most(self.stop) is not False and self.stop.at_most(width) is not False
        if not inside or self.start == self.stop:
            raise BadInput(f"slice: {self.start}:{self.stop} is not a part of width {width}")
        return (self.stop - self.start,)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        return args[0][:, self.start.known : self.stop.known]

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return place_law(self.kind)

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return {Reach.PROPER: Reach.ALL, Reach.SPHERE: Reach.BALL, Reach.SIMPLEX: Reach.BALL}.get(moved[0], moved[0])

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if args[0] else Vanish.NEVER


@dataclass(frozen=True)
class Mix(Op):
    """An operation that looks at other tokens and of which nothing more is known.

    It is judged and planned around, never solved; numbers come from whoever runs the graph
    (`blockkit.trial` gives it random values).
    """

    width: Size | None = field(default=None)
    kind: ClassVar[str] = "mix"
    mixing: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        if self.width is not None:
            return (self.width,)
        if not args:
            raise BadInput("mix needs an argument, or a width")
        return (args[0].width,)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        raise BadInput("a mix node has no numbers of its own; it can be judged, planned and tried")

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.NEVER


@dataclass(frozen=True)
class Opaque(Op):
    """A token-wise operation of which nothing is known: without laws, and with any zeros; planned around.

    Front ends use it for what they cannot name. It has no numbers of its own.
    """

    width: Size
    kind: ClassVar[str] = "opaque"

    def infer(self, args: Sequence[Argument]) -> Shape:
        return (self.width,)

    def forward(self, xp: Arrays, args: Sequence[Any], layout: Layout) -> Array:
        raise BadInput("an opaque node has no numbers of its own; it can be judged and planned around")

    def fills(self, filled: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL
