"""Attention to another sequence as one mixing operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import BadInput
from ..arrays import Array, Arrays
from ..ops import Argument, Shape
from ..packing import Packing, Past
from ..sizes import Size
from .attention import HeadsOp, Stored, by_head, shared_evenly
from .scoring import Scoring


@dataclass(frozen=True)
class CrossAttend(HeadsOp):
    """Attention to another sequence: keys and values come from the rows of `Packing.memory`.

    Arguments: `q [tokens, heads*head_dim]`, then `k_proj [kv_heads*head_dim, memory_width]`,
    `v_proj [kv_heads*value_dim, memory_width]`, and with `bias` `k_proj_bias` and `v_proj_bias`.
    """

    heads: Size
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    memory_width: Size
    scoring: Scoring
    bias: bool = False
    kind: ClassVar[str] = "cross_attend"

    @property
    def sees_later(self) -> bool:
        return False  # of its own sequence it sees nothing at all

    def signal_widths(self) -> dict[str, Size]:
        return {"q": self.heads * self.head_dim}

    def stored(self) -> dict[str, tuple[Size, ...]]:
        widths = {"k_proj": self.kv_heads * self.head_dim, "v_proj": self.kv_heads * self.value_dim}
        matrices = {name: (width, self.memory_width) for name, width in widths.items()}
        biases = {f"{name}_bias": (width,) for name, width in widths.items()} if self.bias else {}
        return {**matrices, **biases, **super().stored()}

    def infer(self, args: Sequence[Argument]) -> Shape:
        shared_evenly(self.kind, self.heads, self.kv_heads)
        return super().infer(args)

    def result(self) -> Size:
        return self.heads * self.value_dim

    def mix(self, xp: Arrays, args: Sequence[Any], packing: Packing, past: Past | None) -> Array:
        """What each segment's rows read of its memory.

        Raises:
            BadInput: there is no memory, or not one for each segment.
        """
        if len(packing.memory) != len(packing.segments):
            raise BadInput(
                f"cross-attention reads another sequence: give `memory`, the encoder's rows [m, {self.memory_width}], "
                f"for each of the {len(packing.segments)} sequence(s); got {len(packing.memory)}"
            )
        stored, kv_heads = dict(zip(self.stored(), args[1:], strict=True)), self.number("kv_heads")
        q, out, start = by_head(xp, args[0], self.number("heads")), [], 0
        for count, memory in zip(packing.segments, packing.memory, strict=True):
            if memory.shape[-1] != self.memory_width:
                raise BadInput(f"memory has width {memory.shape[-1]}; {self.kind} reads {self.memory_width}")
            k, v = (by_head(xp, self._projected(xp, memory, name, stored), kv_heads) for name in ("k_proj", "v_proj"))
            mine = slice(start, start + count)
            at = packing.positions[mine]
            out.append(self.scoring.read(xp, q[:, mine], k, v, at, None, stored))
            start += count
        return out[0] if len(out) == 1 else xp.concatenate(out, axis=0)

    def _projected(self, xp: Arrays, memory: Array, name: str, stored: Stored) -> Array:
        rows = xp.linear(memory, stored[name])
        return rows + stored[f"{name}_bias"] if self.bias else rows
