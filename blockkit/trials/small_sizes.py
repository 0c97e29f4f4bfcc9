"""Small numbers for the sizes of a design, so that it can be tried without allocating a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import product
from typing import Any, get_args, get_type_hints

from ..design.architecture import Architecture
from ..design.components import Component
from ..design.components.composite import Composite
from ..errors import BadInput
from ..graph.graph import Graph
from ..graph.ops.mixing import MixingOp
from ..graph.sizes import Size

WIDTH = 8
WIDEST = 1024
MOST_TRIES = 20_000  # of numbers for the symbols of a width
MOST_NUMBERS = 2_000_000  # of parameters and stand-ins that are drawn for one block
COUNTS = {
    "heads": 4, "kv_heads": 2, "experts": 4, "top_k": 2, "groups": 2, "top_groups": 1, "kernel": 3, "state": 3,
    "dt_rank": 3, "window": 4, "chunk": 4, "length": 5, "places": 5,
}  # fmt: skip
"""By what a size is for. Every other size is even, larger than the stream is wide, and unlike the rest."""


def with_small_sizes(loaded: Architecture | Graph, width: int | None) -> Architecture | Graph:
    """The design with a number for every size.

    Sizes that are known stay as they are, unless that makes a block too large, or `width` asks for another width of
    the residual stream: then all sizes that the design writes as symbols are chosen anew.

    Raises:
        BadInput: the sizes are numbers and too large, or of another width; or no small sizes fit.
    """
    if width is not None and width < 1:
        raise BadInput(f"the width must be at least 1, got {width}")
    if width is not None and width > WIDEST:
        raise BadInput(f"the width {width} is too large to be tried; give a smaller width, at most {WIDEST}")
    graphs = [loaded] if isinstance(loaded, Graph) else list(loaded.graphs.values())
    asked = width is not None and any(g.width != width for g in graphs)
    if not asked and all(_fits(g) for g in graphs):
        return loaded
    if isinstance(loaded, Graph):
        numbers = _chosen(loaded.width, width, dict.fromkeys(_graph_symbols(loaded), ""), {})
        small: Architecture | Graph = graph_with_numbers(loaded, numbers)
    else:
        known = {k: v for k, v in loaded.constants.items() if k not in _architecture_symbols(loaded)}
        if not asked and not any(_numbers(g) is None or _numbers(g) > MOST_NUMBERS for g in graphs):  # type: ignore[operator]
            known = dict(loaded.constants)
        stream = Size.of(loaded.width).bind(known)
        symbols = {s: use for s, use in _architecture_symbols(loaded).items() if s not in known}
        small = replace(loaded, constants={**known, **_chosen(stream, width, symbols, known)})
    for graph in [small] if isinstance(small, Graph) else small.graphs.values():
        _require_small(graph)
    return small


def _chosen(stream: Size, width: int | None, symbols: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, int]:
    """Numbers for symbols, given what each is used for; those of the stream's own width first."""
    found = _width_numbers(stream, width)
    wide = stream.bind(found).known or WIDTH
    others = [s for s in symbols if s not in found]
    found.update({s: COUNTS[symbols[s]] for s in others if symbols[s] in COUNTS})
    return found | {s: 2 * (wide + 1 + i) for i, s in enumerate(s for s in others if symbols[s] not in COUNTS)}


def _width_numbers(stream: Size, width: int | None) -> dict[str, int]:
    """Numbers for the symbols of the stream's width, which is `width`, or small."""
    if stream.known is not None:
        if width is not None and width != stream.known:
            raise BadInput(f"the width of this spec is the number {stream}; to try others, write a symbol in its place")
        return {}
    wanted = width or WIDTH
    symbols = sorted(stream.symbols)
    if wanted ** len(symbols) > MOST_TRIES:
        raise BadInput(f"the width {stream} has too many symbols; give numbers for some of them")
    ways = (dict(zip(symbols, n, strict=True)) for n in product(range(1, wanted + 1), repeat=len(symbols)))
    fitting = [way for way in ways if stream.bind(way) == wanted]
    if not fitting:
        raise BadInput(f"the width {stream} cannot be {wanted}; choose another with --width")
    return max(fitting, key=lambda way: min(way.values()))


def graph_with_numbers(graph: Graph, constants: Mapping[str, int]) -> Graph:
    """The graph with numbers put in for symbols, those of its operations too."""
    nodes = [replace(n, op=_with_numbers(n.op, constants)) for n in graph.nodes]
    stored = [replace(p, shape=tuple(s.bind(constants) for s in p.shape)) for p in graph.parameters]
    return Graph.build(graph.input, graph.output, graph.width.bind(constants), stored, nodes)


def _graph_symbols(graph: Graph) -> list[str]:
    sizes = [s for shape in graph.shapes.values() for s in shape]
    for node in graph.nodes:
        sizes += [v for v in vars(node.op).values() if isinstance(v, Size)]
    return sorted({symbol for s in sizes for symbol in s.symbols})


def _architecture_symbols(architecture: Architecture) -> dict[str, str]:
    """Every symbol in a size of a block, with the setting in which it first stands."""
    found = dict.fromkeys(sorted(Size.of(architecture.width).symbols), "width")
    for block in architecture.blocks.values():
        for use, value in _sizes(block.nodes.values()):
            for symbol in sorted(Size.of(value).symbols):
                found.setdefault(symbol, use)
    return found


def _sizes(components: Iterable[Component]) -> Iterator[tuple[str, Any]]:
    """Settings of components that are sizes: those whose type is a whole number or text."""
    for component in components:
        if isinstance(component, Composite):
            yield from _sizes(component.nodes.values())
            continue
        hints = get_type_hints(type(component))
        for f in fields(component):  # type: ignore[arg-type]
            value = getattr(component, f.name)
            if set(get_args(hints[f.name])) - {type(None)} == {int, str} and value is not None:
                yield f.name, value


def _fits(graph: Graph) -> bool:
    numbers = _numbers(graph)
    return numbers is not None and numbers <= MOST_NUMBERS


def _numbers(graph: Graph) -> int | None:
    """How many numbers a trial draws; None while there are symbols."""
    if _graph_symbols(graph):
        return None
    total = sum(p.numbers.known or 0 for p in graph.parameters)
    for node in graph.nodes:
        if node.op.mixing:
            read = node.args[: node.op.signals] if isinstance(node.op, MixingOp) else node.args
            total += sum((graph.shapes[node.name][0] * graph.shapes[a][0]).known or 0 for a in read)
    return total


def _require_small(graph: Graph) -> None:
    numbers = _numbers(graph)
    if numbers is None:
        raise BadInput(f"no numbers were found for {', '.join(_graph_symbols(graph))}; give them")
    if numbers > MOST_NUMBERS:
        raise BadInput(
            f"a block of this size has {numbers:,} numbers, at most {MOST_NUMBERS:,} are drawn; give a smaller "
            "width, or write its sizes as symbols (hidden: d_ff, its number under `constants`): small ones are put in"
        )


def _with_numbers(op: Any, constants: Mapping[str, int]) -> Any:
    """An operation, with numbers put in for the symbols of its sizes."""
    found = {f.name: getattr(op, f.name).bind(constants) for f in fields(op) if isinstance(getattr(op, f.name), Size)}
    return replace(op, **found) if found else op
