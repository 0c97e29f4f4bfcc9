"""Running a graph: a pure function of parameters, known values and a packed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .arrays import Array, Arrays
from .changes import Overlay, changed_forward
from .graph import Graph, Node
from .packing import Packing

Values = Mapping[str, Array]
Mixer = Callable[[Node, list[Any], Packing], Array]


def needed(graph: Graph, known: Iterable[str], wants: Iterable[str]) -> tuple[Node, ...]:
    """The nodes to compute for `wants` when the values in `known` are there already, in order."""
    have, seen = set(known), set()
    stack = [w for w in wants if w not in have]
    while stack:
        name = stack.pop()
        if name in seen or name not in graph.node:
            continue
        seen.add(name)
        stack.extend(a for a in graph.node[name].args if a not in have and a not in seen)
    return tuple(sorted((graph.node[n] for n in seen), key=lambda n: graph.index[n.name]))


def evaluate(
    graph: Graph,
    xp: Arrays,
    parameters: Values,
    known: Values,
    wants: Iterable[str],
    packing: Packing,
    overlay: Overlay | None = None,
    mixer: Mixer | None = None,
    held: str | None = None,
) -> dict[str, Array]:
    """The values `[tokens, width]` of the nodes in `wants`.

    Args:
        known: values that are given: the input's, and of any node that need not be computed again.
        overlay: changes that are kept beside their parameters, as factors.
        mixer: computes mixing nodes in place of their own forward.
        held: the dtype to which every node's value is rounded, where the arrays' own arithmetic may widen it.
    """
    wants = tuple(wants)
    values: dict[str, Any] = dict(known)
    todo = needed(graph, values, wants)
    last_read = {a: i for i, node in enumerate(todo) for a in node.args}
    for i, node in enumerate(todo):
        args = [values[a] if a in values else parameters[a] for a in node.args]
        changed = [k for k, a in enumerate(node.args) if overlay and a in overlay]
        if node.op.mixing and mixer is not None:
            values[node.name] = mixer(node, args, packing)
        elif changed and overlay:
            change = overlay[node.args[changed[0]]]
            values[node.name] = changed_forward(xp, node, args, packing, changed[0], change)
        else:
            values[node.name] = node.op.forward(xp, args, packing)
        if held is not None:
            values[node.name] = xp.cast(values[node.name], held)
        for a in set(node.args) & values.keys():  # let go of what nobody reads any more
            if last_read[a] == i and a not in wants:
                del values[a]
    return {w: values[w] for w in wants}


def downstream(graph: Graph, parameters: Iterable[str]) -> frozenset[str]:
    """The nodes whose value depends on any of the parameters."""
    found = set(parameters)
    for node in graph.nodes:
        if any(a in found for a in node.args):
            found.add(node.name)
    return frozenset(found & graph.node.keys())
