"""Multi-head attention as one mixing operation: queries, keys and values by head, and what the queries read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..ops import Argument, LayerNorm, RMSNorm, Shape, show_shape
from ..ops.mixing import MixingOp
from ..packing import Packing, Past
from ..sizes import Size
from .rotary import Rope
from .scoring import Scoring

NO_LAYOUT = Packing(None, ())
Stored = Mapping[str, Any]


@dataclass(frozen=True)
class HeadNorm:
    """The norm of queries and keys.

    Attributes:
        norm: RMSNorm or LayerNorm, without parameters.
        over: each head by itself, or all heads' coordinates together.
        scale: then multiplied by `q_norm` and `k_norm`: one vector for each head's coordinates that all heads
            share, one for each head, or none. Over all heads there is one for all coordinates.
        offset: added to the scale.
        bias: `q_norm_bias` and `k_norm_bias`, as wide as the scales, are added.
        after_rope: after the rotation, not before it.
    """

    norm: RMSNorm | LayerNorm
    over: Literal["head", "all"] = "head"
    scale: Literal["shared", "per_head", "none"] = "shared"
    offset: float = 0.0
    bias: bool = False
    after_rope: bool = False

    def width(self, heads: Size, head_dim: Size) -> Size:
        """Of the scale."""
        return head_dim if self.over == "head" and self.scale == "shared" else heads * head_dim

    def stored(self, heads: Size, kv_heads: Size, head_dim: Size) -> dict[str, tuple[Size, ...]]:
        """The parameters that it needs, with their shapes."""
        widths = {"q_norm": self.width(heads, head_dim), "k_norm": self.width(kv_heads, head_dim)}
        found: dict[str, tuple[Size, ...]] = {}
        if self.scale != "none":
            found.update({name: (width,) for name, width in widths.items()})
        if self.bias:
            found.update({f"{name}_bias": (width,) for name, width in widths.items()})
        return found

    def apply(self, xp: Arrays, value: Array, name: str, stored: Stored) -> Array:
        """Over `[tokens, heads*head_dim]` if all heads go together, else over `[heads, tokens, head_dim]`."""
        value = self.norm.forward(xp, [value], NO_LAYOUT)
        if self.scale != "none":
            scale = self._by_head(xp, stored[name], value)
            value = value * (scale + self.offset if self.offset else scale)
        return value + self._by_head(xp, stored[f"{name}_bias"], value) if self.bias else value

    def _by_head(self, xp: Arrays, vector: Array, value: Array) -> Array:
        if self.over == "all" or self.scale == "shared":
            return vector
        return xp.reshape(vector, (int(value.shape[0]), 1, int(value.shape[2])))


class HeadsOp(MixingOp):
    """Base of the attention operations: the first argument's rows become queries, the others' keys and values.

    A subclass has `heads` and `scoring`, and says how heads are made of its arguments.
    """

    heads: Size
    scoring: Scoring

    @property
    def sees_later(self) -> bool:
        return not self.scoring.causal

    def queries(self, xp: Arrays, rows: Array, positions: Array, stored: Stored) -> Array:
        """`[heads, tokens, head_dim]`."""
        raise NotImplementedError

    def keys_values(self, xp: Arrays, rows: Sequence[Array], positions: Array, stored: Stored) -> tuple[Array, Array]:
        """`[kv_heads, tokens, head_dim]` and `[kv_heads, tokens, value_dim]`."""
        raise NotImplementedError

    def signal_widths(self) -> dict[str, Size]:
        """The signals by name, in order, with their widths."""
        raise NotImplementedError

    def stored(self) -> dict[str, tuple[Size, ...]]:
        """The parameters that follow the signals among the arguments, in order, with their shapes."""
        return self.scoring.stored(self.heads)

    @property
    def signals(self) -> int:
        return len(self.signal_widths())

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[heads*value_dim]`; see `Op.infer`."""
        wanted = {**{name: (width,) for name, width in self.signal_widths().items()}, **self.stored()}
        if len(args) != len(wanted):
            raise BadInput(f"{self.kind} takes {len(wanted)} arguments ({', '.join(wanted)}), got {len(args)}")
        for (name, shape), argument in zip(wanted.items(), args, strict=True):
            if argument.shape != shape:
                raise BadInput(f"{self.kind}: {name} must be {show_shape(shape)}, got {show_shape(argument.shape)}")
        return (self.result(),)

    def result(self) -> Size:
        """The width of the result."""
        raise NotImplementedError

    def mix(self, xp: Arrays, args: Sequence[Any], packing: Packing, past: Past | None) -> Array:
        """The attention of each segment's rows over its own rows; the first also sees those of `past`."""
        stored = dict(zip(self.stored(), args[self.signals :], strict=True))
        q = self.queries(xp, args[0], packing.positions, stored)
        rows, k_at, before = list(args[1 : self.signals]), packing.positions, 0
        if past is not None:
            before = int(past.positions.shape[0])
            rows = [xp.concatenate([a, b], axis=0) for a, b in zip(past.args[1:], rows, strict=True)]
            k_at = xp.concatenate([past.positions, k_at], axis=0)
        k, v = self.keys_values(xp, rows, k_at, stored)
        out, start = [], 0
        for number, count in enumerate(packing.segments):
            mine = slice(start, start + count)
            seen = slice(before + start if number else 0, before + start + count)
            at = packing.positions[mine]
            out.append(self.scoring.read(xp, q[:, mine], k[:, seen], v[:, seen], at, k_at[seen], stored))
            start += count
        return out[0] if len(out) == 1 else xp.concatenate(out, axis=0)

    def number(self, name: str) -> int:
        value: Size = getattr(self, name)
        if value.known is None:
            raise BadInput(f"{self.kind}: {name} = {value} has no number yet; bind it before running")
        return value.known


def by_head(xp: Arrays, rows: Array, heads: int) -> Array:
    """`[tokens, heads*head_dim]` -> `[heads, tokens, head_dim]`."""
    split = xp.reshape(rows, (int(rows.shape[0]), heads, int(rows.shape[1]) // heads))
    return xp.transpose(split, (1, 0, 2))


def shared_evenly(kind: str, heads: Size, kv_heads: Size) -> None:
    """Raises BadInput unless every key-value head serves the same number of heads."""
    if heads.known is not None and kv_heads.known and heads.known % kv_heads.known:
        raise BadInput(f"{kind}: {heads} heads cannot share {kv_heads} key-value heads evenly")


@dataclass(frozen=True)
class Attend(HeadsOp):
    """Softmax attention per head over the tokens that the query may see.

    Arguments: `q [tokens, heads*head_dim]`, `k [tokens, kv_heads*head_dim]`, `v [tokens, kv_heads*value_dim]`, and
    the parameters of `norm` and `scoring`.

    Attributes:
        clip: queries, keys and values are held between -clip and clip.
    """

    heads: Size
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    scoring: Scoring
    rope: Rope | None = None
    norm: HeadNorm | None = None
    clip: float | None = None
    kind: ClassVar[str] = "attend"

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"attend: clip must be positive, got {self.clip:g}")

    def signal_widths(self) -> dict[str, Size]:
        keys, values = self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        return {"q": self.heads * self.head_dim, "k": keys, "v": values}

    def stored(self) -> dict[str, tuple[Size, ...]]:
        norms = self.norm.stored(self.heads, self.kv_heads, self.head_dim) if self.norm else {}
        return {**norms, **super().stored()}

    def infer(self, args: Sequence[Argument]) -> Shape:
        shared_evenly(self.kind, self.heads, self.kv_heads)
        return super().infer(args)

    def result(self) -> Size:
        return self.heads * self.value_dim

    def queries(self, xp: Arrays, rows: Array, positions: Array, stored: Stored) -> Array:
        return self._prepared(xp, rows, positions, "q_norm", self.number("heads"), stored)

    def keys_values(self, xp: Arrays, rows: Sequence[Array], positions: Array, stored: Stored) -> tuple[Array, Array]:
        k = self._prepared(xp, rows[0], positions, "k_norm", self.number("kv_heads"), stored)
        return k, by_head(xp, self._clipped(xp, rows[1]), self.number("kv_heads"))

    def _clipped(self, xp: Arrays, rows: Array) -> Array:
        return rows if self.clip is None else -xp.maximum(-xp.maximum(rows, -self.clip), -self.clip)

    def _prepared(self, xp: Arrays, rows: Array, positions: Array, name: str, heads: int, stored: Stored) -> Array:
        """Clipped, normalised and rotated, `[heads, tokens, head_dim]`."""
        value, norm = self._clipped(xp, rows), self.norm
        if norm and norm.over == "all":
            value = norm.apply(xp, value, name, stored)
        value = by_head(xp, value, heads)
        each = norm if norm and norm.over == "head" else None
        if each and not each.after_rope:
            value = each.apply(xp, value, name, stored)
        if self.rope:
            value = self.rope.rotate(xp, value, positions)
        return each.apply(xp, value, name, stored) if each and each.after_rope else value
