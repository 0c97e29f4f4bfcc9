"""Components that look at other tokens by other means than attention: long convolutions, token MLPs, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import BadInput
from ...graph.mixers import AveragePool, CausalConvolution, TokenMLP
from ...graph.ops import Mix, Multiply, Slice
from ...graph.sizes import Size
from .base import Component, Lowering, Signal


@dataclass(frozen=True)
class Mixer(Component):
    """Something that looks at other tokens and of which nothing else is said: judged, never run."""

    input: Signal
    out: int | str | None = None
    name: str = ""
    kind: ClassVar[str] = "mix"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return inputs[0] if self.out is None else to.size(self.out)

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, Mix(None if self.out is None else to.size(self.out)), *inputs)


def split(to: Lowering, name: str, value: str, parts: dict[str, Size]) -> list[str]:
    """Consecutive parts of a value: a node `name.part` for each."""
    found, start = [], Size.of(0)
    for part, width in parts.items():
        found.append(to.add(f"{name}.{part}", Slice(start, start + width), value))
        start = start + width
    return found


def convolve(to: Lowering, name: str, value: str, width: Size, kernel: Size, bias: bool) -> str:
    """A causal convolution of each channel, `name.convolved`: filter `name.conv [width, kernel]` and its bias."""
    stored = [to.store(f"{name}.conv", width, kernel)]
    if bias:
        stored.append(to.store(f"{name}.conv_bias", width))
    return to.add(f"{name}.convolved", CausalConvolution(), value, *stored)


@dataclass(frozen=True)
class LongConvolution(Component):
    """A gated convolution as long as the context: out_proj(q * (filter conv (k * v))), q, k, v after a short one.

    Args:
        length: taps of the long filter, `filter [width, length]`: how far back a token sees.
        kernel: taps of the short convolution of q, k and v.
        bias: biases on the projections and on the short convolution.
    """

    input: Signal
    length: int | str
    kernel: int | str = 3
    bias: bool = True
    name: str = ""
    kind: ClassVar[str] = "long_convolution"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projection, short convolution, slices, the long convolution `NAME.mixed`, gate, output projection."""
        width = to.shapes[inputs[0]]
        three = width + width + width
        projected = to.linear(name, "in_proj", inputs[0], width, three, self.bias)
        short = convolve(to, name, projected, three, to.size(self.kernel), self.bias)
        q, k, v = split(to, name, short, dict.fromkeys("qkv", width))
        product = to.add(f"{name}.kv", Multiply(), k, v)
        stored = to.store(f"{name}.filter", width, to.size(self.length))
        mixed = to.add(f"{name}.mixed", CausalConvolution(), product, stored)
        gated = to.add(f"{name}.gated", Multiply(), q, mixed)
        return to.linear(name, "out_proj", gated, width, width, self.bias)


@dataclass(frozen=True)
class TokenMixing(Component):
    """An MLP along the sequence, the same for every channel, for a fixed number of places (MLP-Mixer)."""

    input: Signal
    places: int | str
    hidden: int | str
    activation: str = "gelu"
    name: str = ""
    kind: ClassVar[str] = "token_mixing"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """One mixing operation: its matrices work along the sequence, not on a token."""
        places, hidden = to.size(self.places), to.size(self.hidden)
        stored = [
            to.store(f"{name}.up_proj", hidden, places),
            to.store(f"{name}.up_proj_bias", hidden),
            to.store(f"{name}.down_proj", places, hidden),
            to.store(f"{name}.down_proj_bias", places),
        ]
        return to.add(name, TokenMLP(self.activation), *inputs, *stored)


@dataclass(frozen=True)
class Pooling(Component):
    """The mean of the rows that a token sees, less its own; no parameters.

    Args:
        window: only tokens less than so many positions away; None for all.
        causal: only the token itself and those before it.
    """

    input: Signal
    window: int | str | None = None
    causal: bool = True
    name: str = ""
    kind: ClassVar[str] = "pooling"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        window = None if self.window is None else to.size(self.window).known
        if window is not None and window < 1:
            raise BadInput(f"window must be at least 1, got {window}")
        return to.add(name, AveragePool(window, self.causal), *inputs)
