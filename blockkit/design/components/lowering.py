"""From named components to the graph of primitive operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...errors import BadInput, blamed
from ...graph.graph import Graph, listed
from ...graph.sizes import Size
from .base import Component, Lowering, inputs_of


def lower(
    components: Mapping[str, Component], input: str, output: str, width: Size, constants: Mapping[str, Any],
    tied: frozenset[str] = frozenset(), frozen: frozenset[str] = frozenset(),
) -> Graph:  # fmt: skip
    """The graph of named components, which may stand in any order but a circle.

    Raises:
        BadInput: an unknown input, a cycle, or a component used with a width it cannot take.
    """
    to = Lowering(constants, width, {input: width})
    values = {input: input}
    if input in components:
        shared = f"two things are named {input!r}: the stream and a component need names of their own"
        raise BadInput(shared, at=input)
    settle(to, components, values)
    marked = [replace(p, tied=p.name in tied, frozen=p.name in frozen) for p in to.parameters]
    return Graph.build(input, values[output], width, marked, to.nodes)


def settle(to: Lowering, components: Mapping[str, Component], values: dict[str, str], owner: str = "") -> None:
    """Adds the nodes of all components, each after those it reads.

    Args:
        values: the nodes of the signals that are there already; the node of every component's result is added.
        owner: whose parts the components are: it comes before their names.

    Raises:
        BadInput: see `lower`.
    """
    for name in in_order(components, tuple(values)):
        component = components[name]
        names = tuple(values[i] for i in inputs_of(component))
        if not names:
            raise BadInput(f"component {name!r} ({component.kind}) reads nothing", at=name)
        try:
            values[name] = component.lower(to, f"{owner}.{name}" if owner else name, names)
            to.shapes[values[name]] = component.width(to, tuple(to.shapes[n] for n in names))
        except BadInput as error:
            raise BadInput(f"component {name!r} ({component.kind}): {error}", at=name) from None
        except Exception as error:
            if type(component).__module__.partition(".")[0] == __package__.partition(".")[0]:
                raise
            raise BadInput(f"component {name!r} ({component.kind}) failed: {blamed(error)}", at=name) from error


def in_order(components: Mapping[str, Component], given: tuple[str, ...]) -> list[str]:
    """Names in dependency order; the checks of names and cycles are the graph's own."""
    ordered: dict[str, None] = {}
    for start in components:
        trail: dict[str, Iterator[str]] = {} if start in ordered else {start: iter(inputs_of(components[start]))}
        while trail:
            name, inputs = next(reversed(trail.items()))
            following = next((i for i in inputs if i not in ordered and i not in given), None)
            if following is None:
                ordered[name] = None
                del trail[name]
            elif following not in components:
                there = listed([*given, *components])
                missing = f"component {name!r} reads {following!r:.80}, which does not exist; there are {there}"
                raise BadInput(missing, at=name)
            elif following in trail:
                raise BadInput(f"the components form a circle through {following!r} and {name!r}", at=name)
            else:
                trail[following] = iter(inputs_of(components[following]))
    return list(ordered)
