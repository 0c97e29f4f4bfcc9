"""Algorithm 1 (arXiv 2511.17864) in lock-step: absorb a context into a model's weights, block by block.

The contextual and the reduced sequence go through each block as one packed run, so that each weight
is read once for both, and only the current block's values are kept. At every block the plan's steps
are solved from the reduced run's *actual* values, and the patched block's own output goes on to the
next block, so rounding does not pile up. What is reported is an ordinary run of the edited model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array
from .errors import BadInput, ConditionViolated, ExactnessLost
from .evaluate import downstream, needed
from .executor import Executor, Overlays
from .graph import Graph
from .layout import Layout
from .metrics import Comparison, compare
from .overlay import Change, dense, plus
from .plan import Plan, make_plan
from .planner import Step
from .run import logits_of, run_stream
from .solve import Operands, asks, reads, solve_step

MODES = ("last", "each", "all")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """What is to be absorbed, and for which tokens the result is to be exact.

    Attributes:
        context, query: token ids `[n]`; the context is what is removed, the query stays at its positions.
        tokens: `last` (one patch, for the query's last token), `each` (a patch a token) or `all`
            (one static patch for all query tokens).
    """

    context: np.ndarray
    query: np.ndarray
    tokens: str = "last"

    def __post_init__(self) -> None:
        if self.tokens not in MODES:
            raise BadInput(f"tokens={self.tokens!r}; allowed are {', '.join(MODES)}")
        if not len(self.query):
            raise BadInput("the query is empty: it must hold at least one token, for which the patch is made")
        if not len(self.context):
            raise BadInput("the context is empty: there is nothing to absorb")

    @property
    def positions(self) -> np.ndarray:
        """The query's positions in the contextual sequence."""
        return np.arange(len(self.context), len(self.context) + len(self.query))

    @property
    def served(self) -> np.ndarray:
        """The rows of the query for which the patch is exact."""
        return np.arange(len(self.query))[-1:] if self.tokens == "last" else np.arange(len(self.query))

    @property
    def capacity(self) -> int | None:
        """How many tokens one static value has to serve; None where each token has its own."""
        return None if self.tokens == "each" else len(self.served)

    @property
    def merge(self) -> bool:
        return self.tokens != "each"


@dataclass(frozen=True)
class Absorbed:
    """A context as changed parameters, with what the edited model's own run shows.

    Attributes:
        overlays: the changes, by layer and parameter.
        contextual: logits of the contextual run, `[served, vocabulary]`.
        patched: logits of an ordinary run of the edited model, `[served, vocabulary]`.
        measured: how far the two are apart.
        residual_by_block: for each block, max |y_R - y_C| / max |y_C| over the served tokens.
        seconds: time by stage.
    """

    request: Request
    plans: Mapping[str, Plan]
    overlays: Overlays
    contextual: np.ndarray
    patched: np.ndarray
    measured: Comparison
    residual_by_block: tuple[float, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


def absorb(
    executor: Executor, request: Request, strategy: str | None = None, progress: Progress | None = None
) -> Absorbed:
    """Absorbs the request's context into the parameters that the strategy chooses.

    Raises:
        BadInput: the sequence is longer than the model's window, or ids are outside the vocabulary.
        NotPatchable: no route of the strategy serves that many tokens.
        ConditionViolated: a value condition does not hold at some block; nothing was changed.
        ExactnessLost: the edited model's own run does not reproduce the contextual one.
    """
    report = progress or (lambda stage, fraction: None)
    clock = time.perf_counter()
    plans = plan_layers(executor, request, strategy)
    overlays, stream, residuals = lock_step(executor, plans, request, report)
    contextual = logits_of(executor, stream)
    solved = time.perf_counter()
    report("running the edited model", 0.0)
    patched = logits_of(executor, run_query(executor, request, overlays)[request.served[0] :])
    done = time.perf_counter()
    measured = compare(patched, contextual)
    _insist(executor, measured, contextual)
    seconds = {"absorb": solved - clock, "edited_run": done - solved}
    return Absorbed(request, plans, overlays, contextual, patched, measured, residuals, seconds)


def plan_layers(executor: Executor, request: Request, strategy: str | None) -> dict[str, Plan]:
    """A plan for every kind of block; equal blocks are planned once."""
    total = len(request.context) + len(request.query)
    if total > executor.window:
        raise BadInput(f"context and query have {total} tokens together; the model's window is {executor.window}")
    chosen = strategy or default_strategy(request.tokens)
    kinds = {executor.architecture.kind_at(layer) for layer in range(executor.depth)}
    return {k: make_plan(executor.architecture.graphs[k], chosen, request.capacity) for k in sorted(kinds)}


def default_strategy(tokens: str) -> str:
    return "joint" if tokens == "all" else "stable"


def lock_step(
    executor: Executor, plans: Mapping[str, Plan], request: Request, report: Progress
) -> tuple[Overlays, Array, tuple[float, ...]]:
    """Both runs through all blocks; gives the changes, the contextual stream at the served rows, residuals."""
    n, q = len(request.context), len(request.query)
    everything = np.concatenate([request.context, request.query, request.query])
    positions = np.concatenate([np.arange(n + q), request.positions])
    stream = executor.embed(everything, positions)
    layout = Layout(executor.positions(positions), (n + q, q))
    overlays: dict[int, dict[str, Change]] = {}
    residuals = []
    for layer in range(executor.depth):
        report("absorbing", layer / executor.depth)
        pair = PackedBlock(executor, layer, plans[executor.architecture.kind_at(layer)], request)
        overlays[layer], stream, residual = pair.patch(stream, layout)
        residuals.append(residual)
    return overlays, stream[n + request.served[0] : n + q], tuple(residuals)


@dataclass
class PackedBlock:
    """One block on its way through Algorithm 1: rows `[context, query, query again (reduced)]`."""

    executor: Executor
    layer: int
    plan: Plan
    request: Request

    @property
    def graph(self) -> Graph:
        return self.executor.graph(self.layer)

    def patch(self, stream: Array, layout: Layout) -> tuple[dict[str, Change], Array, float]:
        """Solves the plan's steps and runs the patched block; gives the changes, the packed output, the residual.

        The patched block runs on the reduced rows alone, as the edited model will: the same program on
        the same values, so that the proof at the end sees what is seen here, bit for bit.
        """
        n, q = len(self.request.context), len(self.request.query)
        graph, steps = self.graph, self.plan.route.steps
        clean = self._clean(downstream(graph, [s.parameter for s in steps]))
        asked = frozenset().union(*(asks(s, graph) for s in steps)) if steps else frozenset()
        wants = sorted({graph.output, *asked, *(clean - {graph.input})})
        values = {graph.input: stream, **self.executor.block(self.layer, {graph.input: stream}, wants, layout)}
        first = int(self.request.served[0])
        target = {name: self.executor.host(values[name][n + first : n + q]) for name in asked | {graph.output}}
        reduced = {name: values[name][n + q :] for name in clean}
        overlay: dict[str, Change] = {}
        for step in steps:
            overlay[step.parameter] = self._solve(step, target, reduced, overlay)
        output, missed = self._ordinary(stream[n + q :], overlay, target[graph.output])
        for _ in range(REFINEMENTS if steps else 0):
            if np.all(np.abs(missed) <= self._eps() * np.abs(target[graph.output])):
                break
            better = {**overlay, steps[-1].parameter: self._solve(steps[-1], target, reduced, overlay, missed)}
            again, left = self._ordinary(stream[n + q :], better, target[graph.output])
            if np.sum(left**2) >= np.sum(missed**2):
                break
            overlay, output, missed = better, again, left
        residual = _relative(missed, target[graph.output])
        contextual = values[graph.output][: n + q]
        return overlay, self.executor.arrays.concatenate([contextual, output], axis=0), residual

    def _ordinary(
        self, stream: Array, overlay: Mapping[str, Change], wanted: np.ndarray
    ) -> tuple[Array, np.ndarray]:
        """The patched block's own output on the reduced rows, and what the served rows miss, `[served, d_model]`."""
        graph = self.graph
        layout = Layout(self.executor.positions(self.request.positions), (len(self.request.query),))
        found = self.executor.block(
            self.layer, {graph.input: stream}, [graph.output], layout, overlay, self.request.merge
        )[graph.output]
        return found, wanted - self.executor.host(found[int(self.request.served[0]) :])

    def _clean(self, dirty: frozenset[str]) -> frozenset[str]:
        """Values untouched by the patch that solving or running on needs: kept instead of computed again."""
        graph = self.graph
        wanted = {graph.output}.union(*(reads(s, graph) for s in self.plan.route.steps))
        rerun = [node for node in needed(graph, (), wanted) if node.name in dirty]
        read = {a for node in rerun for a in node.args} | wanted
        return frozenset(a for a in read if a not in dirty and a not in graph.parameter)

    def _reduced(
        self, step: Step, reduced: Mapping[str, Array], overlay: Mapping[str, Change]
    ) -> dict[str, np.ndarray]:
        """The reduced run's actual values, for the served rows, under the changes made so far."""
        wanted, first = reads(step, self.graph), int(self.request.served[0])
        found = {**reduced, **self._again(reduced, overlay, sorted(wanted - reduced.keys()))}
        return {name: self.executor.host(found[name][first:]) for name in wanted}

    def _again(self, rows: Mapping[str, Array], overlay: Mapping[str, Change], wants: list[str]) -> dict[str, Array]:
        """The block's values from its clean ones; no mixing node is among those to compute."""
        if not wants:
            return {}
        count = int(next(iter(rows.values())).shape[0])
        layout = Layout(self.executor.positions(np.zeros(count, int)), (count,))
        todo = needed(self.graph, rows, wants)
        read = {a for node in todo for a in node.args} | set(wants)
        known = {name: value for name, value in rows.items() if name in read}
        used = {p: c for p, c in overlay.items() if any(p in node.args for node in todo)}
        return self.executor.block(self.layer, known, wants, layout, used, self.request.merge)

    def _stored(self, overlay: Mapping[str, Change]) -> Callable[[str], np.ndarray]:
        def fetch(name: str) -> np.ndarray:
            original = self.executor.stored(self.layer, name)
            return dense(original, overlay[name]) if name in overlay else original

        return fetch

    def _solve(
        self, step: Step, target: Mapping[str, np.ndarray], reduced: Mapping[str, Array],
        overlay: Mapping[str, Change], missed: np.ndarray | None = None,
    ) -> Change:  # fmt: skip
        """The step's whole change: what it was so far, plus what the actual values still ask for.

        With `missed`, what the block's own run leaves at its output stands in for the residual there.
        """
        actual = self._reduced(step, reduced, overlay)
        if missed is not None and step.goal == self.graph.output:
            actual[step.goal] = target[step.goal] - missed
        run = Operands(target, actual, self._stored(overlay), self._eps())
        try:
            change = solve_step(step, self.graph, run, self.request.tokens == "each")
        except ConditionViolated as error:
            message = f"layer {self.layer} ({self.executor.architecture.kind_at(self.layer)}): {error}"
            raise ConditionViolated(
                message, node=error.node, parameter=error.parameter, coordinates=error.coordinates, size=error.size
            ) from None
        return plus(overlay.get(step.parameter), change)

    def _eps(self) -> float:
        return {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[self.executor.dtype]


REFINEMENTS = 3  # corrections of the last parameter by what rounding left


def run_query(executor: Executor, request: Request, overlays: Overlays | None, merge: bool | None = None) -> Array:
    """The edited model on the query alone, at its positions: an ordinary run."""
    apply_merged = request.merge if merge is None else merge
    return run_stream(executor, request.query, request.positions, overlays, apply_merged)


def _relative(missed: np.ndarray, wanted: np.ndarray) -> float:
    size = float(np.abs(wanted).max(initial=0.0))
    return float(np.abs(missed).max(initial=0.0)) / size if size else 0.0


LOOSEST = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}


def _insist(executor: Executor, measured: Comparison, contextual: np.ndarray) -> None:
    """Refuses a patch whose own run is not that of the contextual model, whatever the algebra says."""
    scale = float(np.abs(contextual).max())
    if not measured.linf <= LOOSEST[executor.dtype] * scale:
        raise ExactnessLost(
            f"the edited model's own run is {measured.linf:.3g} away from the contextual logits (which reach "
            f"{scale:.3g}): the plan is ill-conditioned here in {executor.dtype}; choose another strategy or dtype"
        )
