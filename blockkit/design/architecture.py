"""Blocks and whole models, as people declare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from ..display import picture, table, tagged
from ..errors import BadInput
from ..graph.graph import Graph, globs, listed, suggest
from ..graph.sizes import Size
from .components import Component, Number, Stream, inputs_of, lower, with_inputs
from .components.fields import require_fields, require_signal
from .documents import Place, placed


@dataclass(frozen=True)
class Block:
    """A block of named components: from the residual stream `input` to `output`, of the same width.

    Written in Python as an expression, `Block(v + MLP(RMSNorm(v), hidden=64), width=16)`: components
    without a name get one from their kind. In a Block, components read each other by name.

    Attributes:
        output: the name of the last component (or, when written, the component itself).
        width: of the residual stream: a number or a symbol.
        nodes: the components by name.
        input: the name of the residual stream.
        tied: globs of parameters (one or several) that are also used outside one block, so may not move.
        frozen: globs of parameters that may not move because the designer says so.

    Raises:
        BadInput: two components have one name, or the output is none of them.
    """

    output: Any
    width: int | str = "d_model"
    nodes: Mapping[str, Component] = field(default_factory=dict)
    input: str = "x"
    tied: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    place: Place | None = field(default=None, compare=False, repr=False)  # where it is written, for messages

    def __repr__(self) -> str:
        size = f"{len(self.nodes)} components of width {self.width}"
        return tagged(self, f"{self.input} -> {self.output}, {size}: {', '.join(self.nodes)}")

    def _repr_svg_(self) -> str | None:
        return picture(self)

    def __post_init__(self) -> None:
        for key in ("tied", "frozen"):
            object.__setattr__(self, key, globs(key, getattr(self, key)))
        if isinstance(self.output, Component):
            output, nodes, stream = _flatten(self.output)
            for key, value in (("output", output), ("nodes", nodes), ("input", stream)):
                object.__setattr__(self, key, value)
        require_signal(self.output, "a block's output is", Component)
        if self.place is None:  # what is read from a document is checked there, line by line
            require_fields(self)
        if self.output not in self.nodes:
            raise BadInput(f"the output {self.output!r} is no component{suggest(self.output, self.nodes)}")

    def graph(self, constants: Mapping[str, Any] | None = None) -> Graph:
        """The block as primitive operations, with `constants` put in for symbols.

        Raises:
            BadInput: names, widths or globs that do not fit.
        """
        known = constants or {}
        try:
            plain = lower(self.nodes, self.input, self.output, Size.of(self.width).bind(known), known)
        except BadInput as error:
            if self.place is None:
                raise
            raise placed(error, self.place, self.place.at("nodes", self.place.node["nodes"])) from None
        names = [p.name for p in plain.parameters]
        tied, frozen = (_matching(names, given) for given in (self.tied, self.frozen))
        stored = tuple(replace(p, tied=p.name in tied, frozen=p.name in frozen) for p in plain.parameters)
        return replace(plain, parameters=stored)


def _matching(names: list[str], given: tuple[str, ...]) -> frozenset[str]:
    for glob in given:
        if not any(fnmatchcase(n, glob) for n in names):
            raise BadInput(f"{glob!r:.80} matches no parameter; there are {listed(names)}")
    return frozenset(n for n in names if any(fnmatchcase(n, g) for g in given))


def _flatten(out: Component) -> tuple[str, dict[str, Component], str]:
    """Names the components of an expression, inputs first; shared components are taken once."""
    names: dict[int, str] = {}
    nodes: dict[str, Component] = {}
    stream = "x"
    taken = {c.name for c in _walk(out) if c.name}
    for component in _walk(out):
        if isinstance(component, Stream):
            names[id(component)] = stream = component.name
            continue
        name = component.name or _free_name(component.kind, taken)
        if name in nodes:
            raise BadInput(f"two components are named {name!r}")
        taken.add(name)
        names[id(component)] = name
        nodes[name] = with_inputs(component, tuple(names[id(i)] for i in inputs_of(component)))
    if isinstance(out, Stream):
        raise BadInput("a block must do something: its output is the stream itself")
    return names[id(out)], nodes, stream


def _free_name(kind: str, taken: set[str]) -> str:
    name, count = kind, 1
    while name in taken:
        count += 1
        name = f"{kind}_{count}"
    return name


def _walk(out: Component) -> list[Component]:
    """The components of an expression, each once, inputs before readers."""
    ordered: dict[int, Component] = {}
    stack: list[tuple[Component, bool]] = [(out, False)]
    while stack:
        component, ready = stack.pop()
        if not isinstance(component, Component):
            raise BadInput(f"a component reads {component!r}; expected another component or stream()")
        if ready:
            ordered.setdefault(id(component), component)
        elif id(component) not in ordered:
            stack.append((component, True))
            stack.extend((i, False) for i in reversed(inputs_of(component)))
    return list(ordered.values())


@dataclass(frozen=True)
class Embedding:
    """Tokens to the residual stream.

    Attributes:
        vocabulary: number of tokens.
        scale: the embedding is multiplied by it (Gemma: the square root of the width).
        positions: number of learned absolute positions; None for none.

    Raises:
        BadInput: a value has a wrong type.
    """

    vocabulary: int | str
    scale: Number | None = None
    positions: int | str | None = None

    def __post_init__(self) -> None:
        require_fields(self)


@dataclass(frozen=True)
class Head:
    """The residual stream to logits: by the embedding's own matrix if `tied`.

    Attributes:
        bias: a learned shift of the logits.
        scale: the logits are multiplied by it.
        softcap: the logits are capped to softcap * tanh(logits / softcap), at the end.

    Raises:
        BadInput: a value has a wrong type.
    """

    tied: bool | str = True
    softcap: Number | None = None
    bias: bool = False
    scale: Number | None = None

    def __post_init__(self) -> None:
        require_fields(self)


@dataclass(frozen=True)
class Layers:
    """Which block stands where: `pattern` is repeated until there are `count` layers.

    Raises:
        BadInput: a value has a wrong type.
    """

    pattern: tuple[str, ...]
    count: int | str

    def __post_init__(self) -> None:
        require_fields(self)


@dataclass(frozen=True)
class Architecture:
    """A model, or only its blocks: all that is needed to judge it, and with `embedding`, `final` and
    `head`, to run it.

    Attributes:
        stem: what is done to the embedded tokens before the first block; None for nothing.
        constants: numbers for the symbols used in sizes and settings.
        components: the composites that the blocks use, as they are written (see `blockkit.design.vocabulary`).
        context_length: the longest sequence the model was made for.

    Raises:
        BadInput: there is no block, or the layers do not fit the blocks.
    """

    name: str
    width: int | str
    blocks: Mapping[str, Block]
    layers: Layers | None = None
    embedding: Embedding | None = None
    final: Block | None = None
    head: Head | None = None
    context_length: int | str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    note: str = ""
    stem: Block | None = None
    components: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        depth = f", {self.depth or self.layers.count} layers" if self.layers else ""
        return tagged(self, f"{self.name}, width {self.size(self.width)}{depth}, blocks {', '.join(self.blocks)}")

    def _repr_html_(self) -> str:
        depth = f", {self.depth or self.layers.count} layers" if self.layers else ""
        rows = [(kind, self._places(kind), ", ".join(block.nodes)) for kind, block in self.blocks.items()]
        notes = [text for text in (self.note, self.source) if text]
        return table(
            f"{self.name}: width {self.size(self.width)}{depth}", ("block", "layers", "components"), rows, notes
        )

    def _places(self, kind: str) -> str:
        """How many layers are of this kind, or where in the pattern it stands."""
        if self.layers is None:
            return "-"
        if self.depth is not None:
            return str(sum(self.kind_at(layer) == kind for layer in range(self.depth)))
        return f"{self.layers.pattern.count(kind)} of every {len(self.layers.pattern)}"

    def _repr_svg_(self) -> str | None:
        return picture(self)

    def __post_init__(self) -> None:
        require_fields(self)
        if not self.blocks:
            raise BadInput(f"architecture {self.name!r} has no blocks")
        for kind in self.layers.pattern if self.layers else ():
            if kind not in self.blocks:
                raise BadInput(f"layers: {kind!r} is not one of the blocks{suggest(kind, self.blocks)}")
        if self.layers and (not self.layers.pattern or self.depth == 0):
            raise BadInput("layers: the pattern and the count must be at least 1 long")

    def number(self, value: Number | None) -> float | None:
        """A setting, with its constant looked up; None if it is unset or has no number."""
        found = self.constants.get(value) if isinstance(value, str) else value
        return None if found is None or isinstance(found, str) else float(found)

    def size(self, value: int | str) -> Size:
        """A size with the known constants put in.

        Raises:
            BadInput: the text is not a size.
        """
        return Size.of(value).bind(self.constants)

    @cached_property
    def graphs(self) -> Mapping[str, Graph]:
        """The graph of every kind of block, with all known constants put in."""
        return {kind: self.graph_of(block) for kind, block in self.blocks.items()}

    def graph_of(self, block: Block) -> Graph:
        """The graph of one block, with all known constants put in.

        Raises:
            BadInput: see `Block.graph`.
        """
        return replace(block, width=self.width).graph(self.constants)

    @cached_property
    def depth(self) -> int | None:
        """The number of layers, where it is known."""
        return self.size(self.layers.count).known if self.layers else None

    def kind_at(self, layer: int) -> str:
        """The kind of the block that stands in a layer, counted from 0.

        Raises:
            BadInput: the architecture does not say which block stands where.
        """
        if self.layers is None:
            raise BadInput(f"{self.name} does not say which block stands in which layer (give `layers`)")
        return self.layers.pattern[layer % len(self.layers.pattern)]

    def with_used_blocks(self) -> Architecture:
        """The same model without the kinds of blocks that stand in no layer."""
        used = self.layers.pattern if self.layers else tuple(self.blocks)
        return replace(self, blocks={kind: block for kind, block in self.blocks.items() if kind in used})

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's matrix."""
        value = self.head.tied if self.head else True
        return bool(self.constants.get(value, True)) if isinstance(value, str) else value
