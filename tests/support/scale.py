"""Graphs of any number of nodes, of five shapes, to measure how the work of an answer grows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress

from blockkit import api
from blockkit.errors import NotPatchable
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Activation, Add, MatMul, Mix, Multiply, RMSNorm
from blockkit.graph.sizes import Size

NARROW, WIDE = Size.of(8), Size.of(16)


def residual(count: int) -> Graph:
    """Pre-norm MLPs one after the other, each under a learned scale, behind one mixing node."""
    nodes, stored = [Node("m", Mix(), ("x",)), Node("v0", Add(), ("x", "m"))], []
    k = 0
    while len(nodes) < count:
        v = f"v{k}"
        stored += [
            Parameter(f"A{k}", (WIDE, NARROW)),
            Parameter(f"B{k}", (NARROW, WIDE)),
            Parameter(f"s{k}", (NARROW,)),
        ]
        nodes += [
            Node(f"n{k}", RMSNorm(), (v,)),
            Node(f"h{k}", MatMul(), (f"n{k}", f"A{k}")),
            Node(f"a{k}", Activation("gelu"), (f"h{k}",)),
            Node(f"f{k}", MatMul(), (f"a{k}", f"B{k}")),
            Node(f"g{k}", Multiply(), (f"f{k}", f"s{k}")),
            Node(f"v{k + 1}", Add(), (v, f"g{k}")),
        ]
        k += 1
    return Graph.build("x", f"v{k}", NARROW, stored, nodes)


def chain(count: int, frozen: bool = False) -> Graph:
    """Linear layers one after the other behind the mixing node, in one residual branch."""
    return _layers(count, "m", "x", frozen)


def frozen(count: int) -> Graph:
    """`chain` with nothing that may move: a no, and the search for the smallest change of it."""
    return chain(count, frozen=True)


def branch(count: int) -> Graph:
    """Linear layers one after the other, beside the mixing node."""
    return _layers(count, "x", "m", False)


def _layers(count: int, start: str, beside: str, frozen: bool) -> Graph:
    nodes, stored, last = [Node("m", Mix(), ("x",))], [], start
    for k in range(count // 2):
        stored += [Parameter(f"W{k}", (NARROW, NARROW), frozen=frozen), Parameter(f"b{k}", (NARROW,), frozen=frozen)]
        nodes += [Node(f"h{k}", MatMul(), (last, f"W{k}")), Node(f"c{k}", Add(), (f"h{k}", f"b{k}"))]
        last = f"c{k}"
    nodes.append(Node("y", Add(), (beside, last)))
    return Graph.build("x", "y", NARROW, stored, nodes)


def twice(count: int) -> Graph:
    """One scale that is used again and again, so that nothing can be solved for it."""
    nodes, stored = [Node("m", Mix(), ("x",)), Node("v0", Add(), ("x", "m"))], [Parameter("p", (NARROW,))]
    for k in range(count // 2):
        nodes += [Node(f"g{k}", Multiply(), (f"v{k}", "p")), Node(f"v{k + 1}", Add(), (f"v{k}", f"g{k}"))]
    return Graph.build("x", f"v{count // 2}", NARROW, stored, nodes)


SHAPES: dict[str, Callable[[int], Graph]] = {
    "residual": residual, "chain": chain, "frozen": frozen, "branch": branch, "twice": twice,
}  # fmt: skip


def answer(graph: Graph) -> None:
    """What `check` (with its search for a change) and `plan` say."""
    api.explain(graph)
    with suppress(NotPatchable):
        api.plan(graph)


def seconds(graph: Graph) -> tuple[float, float]:
    """What `check` (with its search for a change) and `plan` take, in seconds of this process."""
    gc.collect()
    start = time.process_time()
    api.explain(graph)
    checked = time.process_time()
    with suppress(NotPatchable):
        api.plan(graph)
    return checked - start, time.process_time() - checked
