"""Mixtures of experts as primitive operations: which experts a token is sent to, and with what weight.

The experts of a layer are stacked: one matrix `[experts*d_ff, d_model]` holds all first projections, one matrix
`[d_model, experts*d_ff]` all last ones. The gated sum over experts, sum_e s_e W_e h_e, is then one product
`[W_1 ... W_E] (s (x) h)`: the weights s are repeated over each expert's coordinates and multiplied in, and the laws
of ordinary products and matrices apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ...errors import BadInput
from ..arrays import Array, Arrays, wide_dtype
from ..laws import Law, limited_law
from ..packing import Packing
from ..reach import Reach
from ..sizes import Size
from .base import Argument, Op, Shape, Vanish

Scores = Literal["softmax", "sigmoid"]
ONE = Size.of(1)


@dataclass(frozen=True)
class TopK(Op):
    """Router logits `[experts]` to weights: those of the k chosen experts, zero for the others.

    A second argument, a parameter `[experts]`, is added to the scores for the choice only (DeepSeek-V3).

    Attributes:
        k: how many experts a token is sent to.
        scores: logits to scores over all experts.
        normalise: the chosen scores are divided by their sum.
        eps: added to that sum, in models that do so.
        scale: the weights are multiplied by it at last.
        groups, top_groups: experts in equal groups; only the best `top_groups` groups, by the sum of their two
            best scores, take part.
    """

    k: Size
    scores: Scores = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: Size = ONE
    top_groups: Size = ONE
    eps: float = 0.0
    kind: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        if self.scores not in get_args(Scores):
            raise BadInput(f"top_k: unknown scores {self.scores!r}; allowed are {', '.join(get_args(Scores))}")
        if 0 in (self.groups, self.top_groups) or self.top_groups.at_most(self.groups) is False:
            raise BadInput(f"top_k: {self.top_groups} of {self.groups} groups cannot be chosen")
        if self.scale == 0:
            raise BadInput("top_k: a scale of 0 makes every weight zero; leave the experts out")
        if not self.eps >= 0:
            raise BadInput(f"top_k: eps must not be negative, got {self.eps:g}")

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[experts]`; see `Op.infer`."""
        if not 1 <= len(args) <= 2 or args[0].parameter or (len(args) == 2 and args[1].shape != args[0].shape):
            raise BadInput("top_k takes a signal (router logits) and, if there is one, a correction of the same width")
        experts = args[0].width
        if self.k.at_most(experts) is False or self.k == 0:
            raise BadInput(f"top_k: {self.k} of {experts} experts cannot be chosen")
        if experts.known is not None and self.groups.known is not None and experts.known % self.groups.known:
            raise BadInput(f"top_k: {experts} experts cannot be put into {self.groups} equal groups")
        if (self.k * self.groups).at_most(experts * self.top_groups) is False:
            raise BadInput(f"top_k: {self.k} experts cannot be chosen from {self.top_groups} of {self.groups} groups")
        return args[0].shape

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        """Weights `[tokens, experts]`; see `Op.forward`."""
        wide = wide_dtype(dtype := xp.dtype_of(args[0]))
        logits = xp.cast(args[0], wide)
        scores = xp.softmax(logits) if self.scores == "softmax" else xp.sigmoid(logits)
        ranked = scores + xp.cast(args[1], wide) if len(args) == 2 else scores
        if self.groups != 1:
            ranked = xp.where(self._open(xp, ranked) > 0, ranked, float("-inf"))
        kept = scores * xp.top_k(ranked, _number(self.k, "top_k: k"))
        if self.normalise:
            kept = kept / (xp.mean(kept) * int(kept.shape[-1]) + self.eps)
        return xp.cast(kept * self.scale, dtype)

    def _open(self, xp: Arrays, ranked: Array) -> Array:
        """Ones for the experts `[tokens, experts]` of the best groups, else zeros."""
        tokens, experts = (int(n) for n in ranked.shape)
        groups = _number(self.groups, "top_k: groups")
        each = experts // groups
        grouped = xp.reshape(ranked, (tokens, groups, each))
        best = xp.mean(xp.where(xp.top_k(grouped, min(2, each)) > 0, grouped, 0.0)) * each
        chosen = xp.top_k(xp.reshape(best, (tokens, groups)), _number(self.top_groups, "top_k: top_groups"))
        return _repeated(xp, chosen, each)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.BALL, "its results are weights of a choice: bounded, and mostly zero")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        return Reach.POINT if all(r is Reach.POINT for r in moved) else Reach.BALL

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.HOLES


@dataclass(frozen=True)
class Repeat(Op):
    """Every coordinate `times` over: [a, b] -> [a, a, b, b]."""

    times: Size
    kind: ClassVar[str] = "repeat"
    injective: ClassVar[bool] = True

    def infer(self, args: Sequence[Argument]) -> Shape:
        if len(args) != 1 or args[0].parameter:
            raise BadInput("repeat takes exactly one signal")
        if self.times == 0:
            raise BadInput("repeat: times must be at least 1")
        return (args[0].width * self.times,)

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        """`[tokens, width * times]`; see `Op.forward`."""
        return _repeated(xp, args[0], _number(self.times, "repeat: times"))

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        return limited_law(self.kind, Reach.PROPER, "its results repeat each coordinate")

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        if moved[0] is Reach.POINT or moved[0].one_sided:
            return moved[0]
        return Reach.BALL if moved[0].bounded else Reach.PROPER


def _number(size: Size, what: str) -> int:
    if size.known is None:
        raise BadInput(f"{what} = {size} has no number yet; bind it before running")
    return size.known


def _repeated(xp: Arrays, value: Array, times: int) -> Array:
    """`[tokens, width]` with every coordinate `times` over: `[tokens, width * times]`."""
    tokens, width = (int(n) for n in value.shape)
    column = xp.reshape(value, (tokens, width, 1))
    return xp.reshape(xp.concatenate([column] * times, axis=2), (tokens, width * times))


@dataclass(frozen=True)
class Clamp(Op):
    """y = u held between `low` and `high`; either may be left out."""

    low: float | None = None
    high: float | None = None
    kind: ClassVar[str] = "clamp"

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise BadInput("clamp needs low, high or both")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise BadInput(f"clamp: low {self.low:g} must be less than high {self.high:g}")

    def infer(self, args: Sequence[Argument]) -> Shape:
        if len(args) != 1 or args[0].parameter:
            raise BadInput("clamp takes exactly one signal")
        return args[0].shape

    def forward(self, xp: Arrays, args: Sequence[Any], packing: Packing) -> Array:
        value = args[0] if self.low is None else xp.maximum(args[0], self.low)
        return value if self.high is None else -xp.maximum(-value, -self.high)

    def law(self, position: int, args: Sequence[Argument]) -> Law:
        bounds = [f"never below {self.low:g}" if self.low is not None else "",
                  f"never above {self.high:g}" if self.high is not None else ""]  # fmt: skip
        return limited_law(self.kind, self._range, f"its results are {' and '.join(b for b in bounds if b)}")

    @property
    def _range(self) -> Reach:
        if self.low is None:
            return Reach.NON_POSITIVE
        return Reach.NON_NEGATIVE if self.high is None else Reach.BALL

    def reach(self, moved: Sequence[Reach], args: Sequence[Argument]) -> Reach:
        if moved[0] is Reach.POINT:
            return Reach.POINT
        return Reach.BALL if moved[0].bounded else self._range

    def vanishing(self, args: Sequence[Vanish]) -> Vanish:
        return Vanish.ALL if 0.0 in (self.low, self.high) else args[0]
