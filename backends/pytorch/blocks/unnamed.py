"""Operations that have no law here, under the names that people have for them: what a refusal is to say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from blockkit.graph.ops import Mix, Op, Opaque
from blockkit.graph.sizes import Size

from .draft import Draft, base_of

CONVOLUTIONS = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "convolution": 8}  # where `groups` stands


@dataclass(frozen=True)
class Convolution(Mix):
    """A convolution along the tokens."""

    kind: ClassVar[str] = "convolution along the tokens"


@dataclass(frozen=True)
class DepthwiseConvolution(Mix):
    """A convolution along the tokens of every channel by itself."""

    kind: ClassVar[str] = "depthwise convolution along the tokens"


@dataclass(frozen=True)
class GroupedLinear(Opaque):
    """Several matrices, each of which reads a group of channels."""

    kind: ClassVar[str] = "grouped linear layer"


@dataclass(frozen=True)
class StackedExperts(Opaque):
    """Matrices `[experts, ...]` in one parameter, of which a router chooses."""

    kind: ClassVar[str] = "layer of stacked experts, read as one operation,"


def unnamed(draft: Draft, inside: Iterable[fx.Node], parameters: Iterable[str], mixing: bool, width: Size) -> Op:
    """What no primitive describes, as the operation that it is called.

    Args:
        inside: the program's nodes that it consists of.
        parameters: those that it reads.
    """
    groups = [_groups(node) for node in inside if base_of(node) in CONVOLUTIONS]
    if mixing:
        depthwise = groups and all(many > 1 for many in groups)
        return DepthwiseConvolution(width) if depthwise else Convolution(width) if groups else Mix(width)
    if any(many > 1 for many in groups):
        return GroupedLinear(width)
    stacked = any(draft.tensor(p).dim() == 3 for p in parameters) and not groups
    return StackedExperts(width) if stacked else Opaque(width)


def _groups(node: fx.Node) -> int:
    place = CONVOLUTIONS[base_of(node)]
    found = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
    return found if isinstance(found, int) else 1
