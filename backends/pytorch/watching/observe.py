"""What a run of the model itself shows of a block's values, and which plans can be solved from that.

A run shows the block's input and output and, at every tap, what a call that reads parameters is given and gives.
What lies between follows from the graph, on the few rows that are served, without reading a weight again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from blockkit.errors import BadInput, NotPatchable
from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.graph import Graph, listed
from blockkit.graph.ops import Add, MatMul, Opaque
from blockkit.graph.packing import Packing
from blockkit.planner.plan import STRATEGIES, Plan, make_plan, refusal
from blockkit.planner.route import Step
from blockkit.solve.step import asks, reads

from ..blocks.translate import STREAM, Tap


class Values(Mapping[str, np.ndarray]):
    """Values of nodes, `[rows, width]` in float64: those shown by the run, and those that follow from them."""

    def __init__(self, graph: Graph, shown: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray]) -> None:
        self.graph, self.found, self.parameters = graph, dict(shown), parameters

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.found and (whole := biased(self.graph, name)) in self.found:
            self.found[name] = self.found[whole] - self.parameters[self.graph.node[whole].args[1]]
        if name not in self.found:
            node = self.graph.node[name]
            args = [self.parameters[a] if a in self.graph.parameter else self[a] for a in node.args]
            rows = next((len(a) for a in self.found.values()), 1)
            self.found[name] = node.op.forward(NumpyArrays(), args, Packing(None, (rows,)))
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.node)

    def __len__(self) -> int:
        return len(self.graph.node)


def biased(graph: Graph, name: str) -> str:
    """The sum of a matrix product and its bias, which one call gives; the product's own name if it has none."""
    readers = graph.uses.get(name, ())
    if len(readers) == 1 and isinstance(graph.node[name].op if name in graph.node else None, MatMul):
        reader = graph.node[readers[0][0]]
        if isinstance(reader.op, Add) and len(reader.args) == 2 and reader.args[1] in graph.parameter:
            return reader.name
    return name


def follows(graph: Graph, shown: Iterable[str]) -> frozenset[str]:
    """The nodes whose values follow from those that are shown."""
    found = set(shown)
    for node in graph.nodes:
        if biased(graph, node.name) in found:
            found.add(node.name)
        held = any(graph.parameter[a].frozen for a in node.args if a in graph.parameter)
        hidden = node.op.mixing or isinstance(node.op, Opaque) or (isinstance(node.op, MatMul) and not held)
        if not hidden and all(a in found or a in graph.parameter for a in node.args):
            found.add(node.name)
    return frozenset(found)


def shown_until(taps: tuple[Tap, ...], parameter: str) -> frozenset[str]:
    """What has been shown when the parameter is read, that call included."""
    found = {STREAM}
    for tap in taps:
        found.update([tap.output[0], *(name for name, _ in tap.signals)])
        if parameter in tap.parameters:
            return frozenset(found)
    return frozenset()


def hidden_from(step: Step, graph: Graph, taps: tuple[Tap, ...], late: bool) -> str | None:
    """A value that the step needs and the run does not show in time; None if there is none.

    `late`: not when the parameter is read, but when the block has run.
    """
    if sum(step.parameter in tap.parameters for tap in taps) != 1:
        return f"the call that reads {step.parameter}"
    everything = {STREAM, graph.output}.union(*(shown_until(taps, p) for t in taps for p in t.parameters))
    for wanted, shown in (
        (asks(step, graph), everything),
        (reads(step, graph) - {graph.input}, everything if late else shown_until(taps, step.parameter)),
    ):
        missing = sorted(wanted - follows(graph, shown))
        if missing:
            return missing[0]
    return None


@dataclass(frozen=True)
class Chosen:
    """A plan that a run of the model can solve, and the taps that it needs.

    Attributes:
        late: whether the block has to have run before its steps can be solved, and runs again with each of them.
    """

    plan: Plan
    taps: tuple[Tap, ...]
    late: bool = False


def choose(
    graph: Graph,
    taps: tuple[Tap, ...],
    strategy: str | None,
    capacity: int | None,
    frozen: tuple[str, ...] = (),
    twice: bool = True,
) -> Chosen:
    """The strategy's plan; parameters for which a run of the model does not show enough are left alone.

    Args:
        twice: whether a block may run more than once.

    Raises:
        BadInput: an unknown strategy.
        NotPatchable: no route that serves that many tokens can be solved in a run.
    """
    wanted = (strategy,) if strategy else ("joint", "matrix") if (capacity or 1) > 1 else ("stable",)
    if strategy is not None and strategy not in STRATEGIES:
        raise BadInput(f"unknown strategy {strategy!r}; allowed are {', '.join(STRATEGIES)}")
    unseen: dict[str, str] = {}
    for late in (False, True) if twice else (False,):
        held: list[str] = list(frozen)
        while (plan := _planned(graph.restricted(freeze=held) if held else graph, wanted, capacity)) is not None:
            hidden = {s.parameter: v for s in plan.route.steps if (v := hidden_from(s, graph, taps, late))}
            if not hidden:
                return Chosen(plan, taps if late else needed_taps(plan, taps), late)
            unseen |= hidden
            held.append(next(iter(hidden)))
    if unseen:
        shown = "; ".join(f"{parameter} needs {value}" for parameter, value in unseen.items())
        raise NotPatchable(
            f"there are routes, but a run of the model does not show what solving for them takes: {shown}"
        )
    limited = graph.restricted(freeze=list(frozen)) if frozen else graph
    if strategy is not None:
        make_plan(limited, strategy, capacity)  # says why not
    held_too = f" ({listed(frozen)} may not move)" if frozen else ""
    raise NotPatchable(f"{refusal(limited, capacity)}{held_too}")


def _planned(graph: Graph, strategies: tuple[str, ...], capacity: int | None) -> Plan | None:
    """The first of the strategies' plans that there is."""
    for strategy in strategies:
        with suppress(NotPatchable):
            return make_plan(graph, strategy, capacity)
    return None


def needed_taps(plan: Plan, taps: tuple[Tap, ...]) -> tuple[Tap, ...]:
    """The taps that solving the plan reads: those of its parameters, and those from which other values follow."""
    graph, kept = plan.graph, set[Tap]()
    for step in plan.route.steps:
        place = next(i for i, tap in enumerate(taps) if step.parameter in tap.parameters)
        kept.add(taps[place])
        kept |= _leading(asks(step, graph) - {graph.output}, graph, taps)
        kept |= _leading(reads(step, graph), graph, taps[: place + 1])
    return tuple(tap for tap in taps if tap in kept)


def _leading(wanted: frozenset[str], graph: Graph, taps: tuple[Tap, ...]) -> set[Tap]:
    """The taps from which some values follow."""
    kept, pending, seen = set[Tap](), list(wanted), set(wanted)
    while pending:
        name = pending.pop()
        tap = _showing(name, graph, taps)
        if tap is not None:
            kept.add(tap)
            continue
        for arg in graph.node[name].args if name in graph.node and not graph.node[name].op.mixing else ():
            if arg not in seen and arg not in graph.parameter:
                seen.add(arg)
                pending.append(arg)
    return kept


def _showing(name: str, graph: Graph, taps: tuple[Tap, ...]) -> Tap | None:
    """The tap that shows a value: as what it gives, or else as what it reads."""
    whole = biased(graph, name) if name in graph.node else name
    for tap in taps:
        if tap.output[0] in (name, whole):
            return tap
    return next((tap for tap in taps if any(name == s for s, _ in tap.signals)), None)
