"""One block of Algorithm 1: both runs through it together, its patch, and the patched block's own output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConditionViolated
from ..graph.arrays import Array, NumpyArrays
from ..graph.changes import Change, MatrixChange, added, dense, narrowed, plus
from ..graph.evaluate import downstream, needed
from ..graph.graph import Graph, Node
from ..graph.ops import MatMul
from ..graph.packing import Packing, Past
from ..planner.plan import Plan
from ..planner.route import Step
from ..solve.step import Operands, asks, reads, rounding, solve_step
from .executor import Executor, Rows
from .request import Request

REFINEMENTS = 3  # corrections of the last parameter by what rounding left
EPS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
Host = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stepped:
    """What a block gave.

    Attributes:
        overlay: the changes, by parameter.
        edited: the changed parameters, merged; empty where the changes stay beside them.
        contextual, reduced: the two runs' residual streams after the block.
        residual: max |y_R - y_C| / max |y_C| over the served tokens.
    """

    overlay: Mapping[str, Change]
    edited: Mapping[str, Array]
    contextual: Array
    reduced: Array
    residual: float


@dataclass
class BlockStepper:
    """Patches blocks of one kind. What depends on the plan alone is worked out once, when it is built."""

    executor: Executor
    plan: Plan
    request: Request
    context_rows: int

    def __post_init__(self) -> None:
        request, steps = self.request, self.plan.route.steps
        n, q = self.context_rows, len(request.query)
        self.graph: Graph = self.plan.graph
        self.eps = EPS[self.executor.dtype]
        self.first = int(request.served[0])
        self.asked = sorted({self.graph.output}.union(*(asks(s, self.graph) for s in steps)))
        self.clean = sorted(_clean(self.graph, steps))
        moved = [tuple(s.parameter for s in steps[:i]) for i in range(len(steps) + 1)]
        self.stale = {parameters: downstream(self.graph, parameters) for parameters in moved}
        self.onward = Rows(self.graph.output, 0, n + q)
        self.served = {name: Rows(name, n + self.first, n + q) for name in self.asked}
        self.kept = {name: Rows(name, n + q, n + 2 * q) for name in self.clean}
        self.wants = tuple(dict.fromkeys([self.onward, *self.served.values(), *self.kept.values()]))
        positions = self.executor.positions(request.reduced_positions)
        before = np.arange(n)
        everywhere = self.executor.positions(np.concatenate([before, request.positions, request.reduced_positions]))
        self.packed = Packing(everywhere, (n + q, q))
        self.alone = Packing(positions, (q,))

    def absorb(self, layer: int, contextual: Array, reduced: Array, past: Mapping[str, Past] | None = None) -> Stepped:
        """Solves the plan's steps and runs the patched block.

        Args:
            contextual: its residual stream, `[context_rows + query, d_model]`.
            reduced: its residual stream, `[query, d_model]`.
            past: what mixing nodes of the contextual run remember of context rows that are not among its rows.

        The reduced stream that it gives is an ordinary run of the edited block: the same program on the same
        values that the proof at the end will run.
        """
        self.merging: dict[str, tuple[Change, Array]] = {}
        graph, steps = self.graph, self.plan.route.steps
        found = self.executor.block(
            layer, {graph.input: (contextual, reduced)}, self.wants, replace(self.packed, past=past or {})
        )
        target = {name: self.executor.host(found[rows]) for name, rows in self.served.items()}
        clean = {name: found[rows] for name, rows in self.kept.items()}
        overlay: dict[str, Change] = {}
        actual: Host = {}
        for step in steps:
            actual = self._actual(layer, step, clean, overlay)
            overlay[step.parameter] = self._solve(layer, step, target, actual, overlay)
        after, missed = self._ordinary(layer, reduced, overlay, target)
        if steps and layer == self.executor.depth - 1 and steps[-1].goal == graph.output:
            overlay, after, missed = self._refined(layer, reduced, target, actual, overlay, after, missed)
        residual = _relative(missed, target[graph.output])
        return Stepped(overlay, self._held(layer, overlay)[1], found[self.onward], after, residual)

    def _actual(
        self, layer: int, step: Step, clean: Mapping[str, Array], overlay: Mapping[str, Change]
    ) -> dict[str, np.ndarray]:
        """The reduced run's actual values, for the served rows, under the changes made so far."""
        wanted, stale = reads(step, self.graph), self.stale[tuple(overlay)]
        kept = {name: value for name, value in clean.items() if name not in stale}
        missing = sorted(wanted - kept.keys())
        found = {name: self._served(kept[name]) for name in wanted & kept.keys()}
        if not missing:
            return found
        todo = needed(self.graph, kept, missing)
        read = {a for node in todo for a in node.args}
        used = {p: c for p, c in overlay.items() if p in read}
        predicted = self._predicted(layer, todo, clean, used) if self.executor.written is None else None
        if predicted is not None:  # of weights that are rounded coarsely, factors predict too little
            return found | {name: predicted[name] for name in missing}
        known = {name: value for name, value in kept.items() if name in read}
        beside, edited = self._held(layer, used)
        again = self.executor.block(layer, known, missing, self.alone, beside, edited)
        return found | {name: self._served(value) for name, value in again.items()}

    def _predicted(
        self, layer: int, todo: tuple[Node, ...], clean: Mapping[str, Array], overlay: Mapping[str, Change]
    ) -> dict[str, np.ndarray] | None:
        """The values of `todo` worked out on the host, if no weight has to be read again; else None.

        A matrix product whose weight changed is its value before, plus what the factors add to it.
        """
        values: dict[str, np.ndarray] = {}

        def value(name: str) -> np.ndarray:
            if name not in values:
                values[name] = (
                    self._stored(layer, overlay)(name) if name in self.graph.parameter else self._served(clean[name])
                )
            return values[name]

        for node in todo:
            change = overlay.get(node.args[1]) if isinstance(node.op, MatMul) else None
            if isinstance(change, MatrixChange) and node.name in clean and node.args[0] in clean:
                values[node.name] = value(node.name) + added(NumpyArrays(), value(node.args[0]), change)
            elif isinstance(node.op, MatMul) or any(
                a not in clean and a not in values and a not in self.graph.parameter for a in node.args
            ):
                return None
            else:
                values[node.name] = node.op.forward(NumpyArrays(), [value(a) for a in node.args], self.alone)
        return values

    def _served(self, value: Array) -> np.ndarray:
        return self.executor.host(value)[self.first :]

    def _solve(self, layer: int, step: Step, target: Host, actual: Host, overlay: Mapping[str, Change]) -> Change:
        """The step's whole change: what it was so far, plus what the actual values still ask for."""
        run = Operands(target, actual, self._stored(layer, overlay), self.eps)
        try:
            change = solve_step(step, self.graph, run, self.request.tokens == "each")
        except ConditionViolated as error:
            message = f"layer {layer} ({self.executor.architecture.kind_at(layer)}): {error}"
            raise ConditionViolated(
                message, node=error.node, parameter=error.parameter, coordinates=error.coordinates, size=error.size
            ) from None
        return plus(overlay.get(step.parameter), narrowed(change, self.executor.dtype))

    def _refined(
        self, layer: int, reduced: Array, target: Host, actual: Host,
        overlay: dict[str, Change], after: Array, missed: np.ndarray,
    ) -> tuple[dict[str, Change], Array, np.ndarray]:  # fmt: skip
        """Lets the last parameter absorb what rounding left at the model's last block.

        The blocks before it need no such thing: the next one starts from their actual output.
        """
        last = self.plan.route.steps[-1]
        allowed = rounding(last, self.graph, target[last.goal], actual, self.eps)
        for _ in range(REFINEMENTS):
            if np.all(np.abs(missed) <= allowed):
                break
            seen = {**actual, last.goal: target[last.goal] - missed}
            better = {**overlay, last.parameter: self._solve(layer, last, target, seen, overlay)}
            again, left = self._ordinary(layer, reduced, better, target)
            if np.sum(left**2) >= np.sum(missed**2):
                break
            overlay, after, missed = better, again, left
        return overlay, after, missed

    def _ordinary(
        self, layer: int, reduced: Array, overlay: Mapping[str, Change], target: Host
    ) -> tuple[Array, np.ndarray]:
        """The patched block's output on the reduced rows, and what the served rows miss, `[served, d_model]`."""
        graph, (beside, edited) = self.graph, self._held(layer, overlay)
        known = {graph.input: reduced}
        after = self.executor.block(layer, known, [graph.output], self.alone, beside, edited)[graph.output]
        return after, target[graph.output] - self._served(after)

    def _held(self, layer: int, overlay: Mapping[str, Change]) -> tuple[Mapping[str, Change], dict[str, Array]]:
        """The changes as the edited model will hold them: beside the weights, or merged into them."""
        if not self.request.merge:
            return overlay, {}
        for name, change in overlay.items():
            if name not in self.merging or self.merging[name][0] is not change:
                self.merging[name] = change, self.executor.merged(layer, {name: change})[name]
        return {}, {name: self.merging[name][1] for name in overlay}

    def _stored(self, layer: int, overlay: Mapping[str, Change]) -> Callable[[str], np.ndarray]:
        def fetch(name: str) -> np.ndarray:
            if name in overlay and self.executor.written is not None and self.request.merge:
                return self.executor.host(self._held(layer, {name: overlay[name]})[1][name])
            original = self.executor.stored(layer, name)
            return dense(original, overlay[name]) if name in overlay else original

        return fetch


def _clean(graph: Graph, steps: tuple[Step, ...]) -> frozenset[str]:
    """Values that the patch leaves as they are and that solving it reads: kept instead of computed again."""
    dirty = downstream(graph, [s.parameter for s in steps])
    first = reads(steps[0], graph) if steps else frozenset()  # nothing is changed yet when it is solved
    wanted = frozenset().union(*(reads(s, graph) for s in steps))
    rerun = [node for node in needed(graph, (), wanted) if node.name in dirty]
    read = {a for node in rerun for a in node.args} | wanted
    return first | {a for a in read if a not in dirty and a not in graph.parameter}


def _relative(missed: np.ndarray, wanted: np.ndarray) -> float:
    size = float(np.abs(wanted).max(initial=0.0))
    return float(np.abs(missed).max(initial=0.0)) / size if size else 0.0
