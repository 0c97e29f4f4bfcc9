"""A numerical trial of a plan on one block: random weights, a random context, the laws, an ordinary run.

The shortest way from a plan to a proof that it works. Mixing nodes, of whatever kind, are stood in
for by random affine maps of their signals whose offset is one thing in the contextual run and
another in the reduced run. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import BadInput, ConditionViolated
from ..graph.arrays import NumpyArrays
from ..graph.changes import Change, MatrixChange, VectorChange, dense, plus
from ..graph.evaluate import Mixer, evaluate
from ..graph.graph import Graph, Node
from ..graph.ops import Mix
from ..graph.packing import Packing
from ..planner.plan import Plan
from ..planner.route import Step
from ..solve.step import Operands, solve_step

EPS = 2.0**-53
Values = dict[str, np.ndarray]
Changes = Mapping[str, Change]


class Runs(Protocol):
    """A block with numbers in its two runs: what a plan is solved on."""

    @property
    def graph(self) -> Graph: ...
    @property
    def parameters(self) -> Mapping[str, np.ndarray]: ...
    @property
    def tokens(self) -> int:
        """How many tokens are served."""

    def rows(
        self, contextual: bool, wants: tuple[str, ...], parameters: Mapping[str, np.ndarray], served: slice
    ) -> Values:
        """Nodes of `wants` in an ordinary run with whole `parameters`, at some served tokens, `[rows, width]`."""


@dataclass(frozen=True)
class Mixing:
    """The stand-in for a mixing node: `sum_i M_i arg_i + offset`, over its signals.

    Attributes:
        matrices: one `[width, width of the argument]` for each argument read, in their order.
        contextual, reduced: the offsets of the two runs, `[tokens, width]`.
    """

    matrices: tuple[np.ndarray, ...]
    contextual: np.ndarray
    reduced: np.ndarray


@dataclass(frozen=True)
class Trial:
    """A block with numbers, and a context for it.

    Attributes:
        parameters: float64 arrays `[d_out, d_in]` or `[width]` by name.
        input: the residual stream, `[tokens, width]`, the same in both runs.
        mixing: the stand-ins by mixing node.
    """

    graph: Graph
    parameters: Mapping[str, np.ndarray]
    input: np.ndarray
    mixing: Mapping[str, Mixing]

    @property
    def tokens(self) -> int:
        return len(self.input)

    def rows(
        self, contextual: bool, wants: tuple[str, ...], parameters: Mapping[str, np.ndarray], served: slice
    ) -> Values:
        """See `Runs`."""
        stream = self.input[served]
        packing = Packing(np.arange(len(stream)), (len(stream),))
        known = {self.graph.input: stream}
        mixer = _mixer(self, contextual, served)
        return evaluate(self.graph, NumpyArrays(), parameters, known, wants, packing, mixer=mixer)


@dataclass(frozen=True)
class Result:
    """What became of a plan.

    Attributes:
        relative_linf: max |patched - contextual| / max |contextual| at the output.
        unpatched_relative: the same without the patch: how much there was to do.
        changes: the solved changes by parameter.
        patched_parameters: every parameter with its change merged; per token, the changed ones
            are `[tokens, ...]`.
        output_contextual, output_patched: `[tokens, width]`.
    """

    relative_linf: float
    unpatched_relative: float
    changes: Changes
    patched_parameters: Mapping[str, np.ndarray]
    output_contextual: np.ndarray
    output_patched: np.ndarray


def draw(graph: Graph, seed: int = 0, tokens: int = 1) -> Trial:
    """Random weights (scaled by 1 / sqrt(d_in)), a random stream and a random context.

    Raises:
        BadInput: a size of the graph is still a symbol, or there are no tokens.
    """
    if tokens < 1:
        raise BadInput(f"a trial needs at least one token, got {tokens}")
    widths, rng = numbers_of(graph), np.random.default_rng(seed)
    parameters = random_parameters(graph, widths, rng)
    stream = rng.normal(size=(tokens, *widths[graph.input]))
    mixing = {n.name: _stand_in(graph, n, widths, rng, tokens) for n in graph.nodes if n.op.mixing}
    return Trial(graph, parameters, stream, mixing)


def numbers_of(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every shape of the graph in numbers.

    Raises:
        BadInput: one holds a symbol.
    """
    return {name: tuple(_number(graph, name, s.known) for s in shape) for name, shape in graph.shapes.items()}


def random_parameters(graph: Graph, widths: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Values:
    """Vectors of order one, matrices of order 1 / sqrt(d_in)."""
    return {p.name: rng.normal(size=widths[p.name]) / _spread(widths[p.name]) for p in graph.parameters}


def _number(graph: Graph, name: str, size: int | None) -> int:
    if size is None:
        shown = ", ".join(map(str, graph.shapes[name]))
        raise BadInput(f"{name!r} has the size [{shown}]: a trial needs numbers for all symbols (see Graph.bound)")
    return size


def _spread(shape: tuple[int, ...]) -> float:
    return float(np.sqrt(shape[1])) if len(shape) == 2 else 1.0


def _stand_in(
    graph: Graph, node: Node, widths: Mapping[str, tuple[int, ...]], rng: np.random.Generator, tokens: int
) -> Mixing:
    (width,) = widths[node.name]
    read = [widths[a][0] for a in node.args if _read(graph, node, a)]
    matrices = tuple(rng.normal(size=(width, d_in)) / np.sqrt(d_in) for d_in in read)
    contextual, reduced = rng.normal(size=(2, tokens, width))
    return Mixing(matrices, contextual, reduced)


def _read(graph: Graph, node: Node, arg: str) -> bool:
    """Whether a stand-in reads the argument: any signal; a vector of parameters, where nothing else is known of it."""
    return arg not in graph.parameter or (isinstance(node.op, Mix) and len(graph.shapes[arg]) == 1)


def run(
    trial: Trial, contextual: bool, wants: tuple[str, ...], parameters: Mapping[str, np.ndarray] | None = None
) -> Values:
    """An ordinary run with whole parameters (by default the trial's): nodes of `wants`, `[tokens, width]`."""
    return trial.rows(contextual, wants, parameters or trial.parameters, slice(None))


def _mixer(trial: Trial, contextual: bool, rows: slice) -> Mixer:
    def mix(node: Node, args: list[Any], packing: Packing) -> np.ndarray:
        stand_in = trial.mixing[node.name]
        signals = [value for a, value in zip(node.args, args, strict=True) if _read(trial.graph, node, a)]
        offset = (stand_in.contextual if contextual else stand_in.reduced)[rows]
        total = offset + sum(u @ m.T for u, m in zip(signals, stand_in.matrices, strict=True))
        return np.asarray(total)

    return mix


def solve(trial: Runs, plan: Plan, per_token: bool = False) -> Result:
    """Solves the plan's steps in order and runs the edited block.

    Args:
        per_token: every token gets changes of its own, in place of one static change for all.

    Raises:
        ConditionViolated: a value condition of a law does not hold, or the block itself has no finite value.
    """
    graph, steps = trial.graph, plan.route.steps
    every = (graph.input, *graph.node)
    contextual = trial.rows(True, every, trial.parameters, slice(None))
    unpatched = trial.rows(False, (graph.output,), trial.parameters, slice(None))[graph.output]
    if not (np.isfinite(contextual[graph.output]).all() and np.isfinite(unpatched).all()):
        what = f"the block's own values at {graph.output!r} are not finite"
        raise ConditionViolated(f"{what}: there is nothing to reproduce", node=graph.output, parameter="")
    changes: dict[str, Change] = {}
    for step in steps:
        changes[step.parameter] = _solved(trial, step, contextual, changes, per_token)
    wanted, output = contextual[graph.output], _edited(trial, changes, (graph.output,), per_token)[graph.output]
    if steps:  # what rounding left, for the last parameter
        last = steps[-1]
        better = {**changes, last.parameter: _solved(trial, last, contextual, changes, per_token)}
        again = _edited(trial, better, (graph.output,), per_token)[graph.output]
        if np.abs(again - wanted).max() < np.abs(output - wanted).max():
            changes, output = better, again
    return Result(
        relative_linf(output, wanted),
        relative_linf(unpatched, wanted),
        changes,
        _stacked(trial, changes) if per_token else _merged(trial, changes),
        wanted,
        output,
    )


def relative_linf(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |found - wanted| / max |wanted|; just the numerator where all that is wanted is zero."""
    size = float(np.abs(wanted).max())
    return float(np.abs(found - wanted).max()) / (size or 1.0)


def _solved(trial: Runs, step: Step, contextual: Values, changes: Changes, per_token: bool) -> Change:
    """The step's whole change: what it was so far, plus what the edited block's actual values still ask for."""
    actual = _edited(trial, changes, (trial.graph.input, *trial.graph.node), per_token)
    merged = {} if per_token else _merged(trial, changes)  # no path reads a parameter that has moved before

    def stored(name: str) -> np.ndarray:
        return merged.get(name, trial.parameters[name])

    change = solve_step(step, trial.graph, Operands(contextual, actual, stored, EPS), per_token)
    return plus(changes.get(step.parameter), change)


def _edited(trial: Runs, changes: Changes, wants: tuple[str, ...], per_token: bool) -> Values:
    """The edited block's reduced run, with merged parameters; tokens with changes of their own run alone."""
    if not per_token:
        return trial.rows(False, wants, _merged(trial, changes), slice(None))
    tokens = range(trial.tokens)
    alone = [trial.rows(False, wants, _merged(trial, _of_token(changes, t)), slice(t, t + 1)) for t in tokens]
    return {name: np.concatenate([values[name] for values in alone]) for name in wants}


def _merged(trial: Runs, changes: Changes) -> Values:
    """All parameters, with static changes merged into them."""
    return {n: dense(v, changes[n]) if n in changes else v for n, v in trial.parameters.items()}


def _stacked(trial: Runs, changes: Changes) -> Values:
    """All parameters, the changed ones once for each token: `[tokens, ...]`."""
    alone = [_merged(trial, _of_token(changes, t)) for t in range(trial.tokens)]
    return {n: np.stack([a[n] for a in alone]) if n in changes else v for n, v in trial.parameters.items()}


def _of_token(changes: Changes, token: int) -> Changes:
    """The static changes that serve one token."""

    def part(change: Change) -> Change:
        if isinstance(change, MatrixChange):
            return MatrixChange(change.left[token : token + 1], change.right[token : token + 1])
        return VectorChange(change.delta[token])

    return {name: part(change) for name, change in changes.items()}
