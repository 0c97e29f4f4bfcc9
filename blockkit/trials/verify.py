"""A patch tried out on small random numbers, and written down so that anybody can recheck it.

Weights, the residual stream and the context are drawn, the plan is solved by the reference executor, and the edited
block is run as an ordinary block. What mixes tokens is stood in for as in `blockkit.trials.trial`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import api
from ..atomic import write_file
from ..design.components import Component
from ..design.raw_graph import graph_document, raw_graph
from ..display import tagged
from ..errors import BadInput, ConditionViolated, NotPatchable
from ..graph.graph import Globs, Graph, suggest
from ..planner.plan import make_plan
from .small_sizes import with_small_sizes
from .trial import Mixing, Result, Trial, draw, solve

EXACT = 1e-9  # relative error in float64 up to which a patch is called exact


@dataclass(frozen=True)
class BlockTrial:
    """One kind of block, tried.

    Attributes:
        block: its name; several that the planner cannot tell apart are joined by `/`.
        parameters: what the patch moves.
        relative_linf: max |patched - contextual| / max |contextual| at the output; None where there is no patch.
        unpatched_relative: the same without a patch.
        conditions: what had to hold of the values.
        reason: why there is no exact patch; empty where there is.
    """

    block: str
    parameters: tuple[str, ...]
    relative_linf: float | None
    unpatched_relative: float | None
    conditions: tuple[str, ...]
    reason: str = ""
    trial: Trial | None = field(default=None, repr=False)
    result: Result | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Verification:
    """A design, tried; the values at the top are those of its worst block."""

    strategy: str
    tokens: int
    seed: int
    blocks: tuple[BlockTrial, ...]

    @property
    def worst(self) -> BlockTrial:
        """The block with the largest relative error; one that could not be tried counts as the worst."""
        return max(self.blocks, key=lambda b: np.inf if b.relative_linf is None else b.relative_linf)

    @property
    def exact(self) -> bool:
        """Whether every block was tried and is exact."""
        return not any(b.reason for b in self.blocks)

    @property
    def block(self) -> str:
        """The kind of the worst block."""
        return self.worst.block

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the worst block's plan moved."""
        return self.worst.parameters

    @property
    def relative_linf(self) -> float | None:
        """Its largest error over the largest value of the contextual output; None where nothing was run."""
        return self.worst.relative_linf

    @property
    def unpatched_relative(self) -> float | None:
        """The same without a patch."""
        return self.worst.unpatched_relative

    @property
    def conditions(self) -> tuple[str, ...]:
        """What must hold of the values for its plan to be exact, in words."""
        return self.worst.conditions

    @property
    def reason(self) -> str:
        """Why the worst block is not exact; empty if it is."""
        return self.worst.reason

    def __repr__(self) -> str:
        exact = "exact" if self.exact else f"no: {self.reason}"
        return tagged(self, f"strategy {self.strategy}, {self.tokens} token(s), seed {self.seed}: {exact}")

    def __str__(self) -> str:
        lines = [f"strategy {self.strategy}, {self.tokens} token(s), seed {self.seed}"]
        for b in self.blocks:
            names = " + ".join(b.parameters) or "nothing to do"
            lines.append(f"{b.block}: {'exact' if not b.reason else 'no: ' + b.reason}")
            if b.relative_linf is not None:
                lines.append(f"  relative error {b.relative_linf:.2g}, without a patch {b.unpatched_relative:.2g}")
                lines.append(f"  moved: {names}")
            lines.extend(f"  if {c}" for c in b.conditions)
        return "\n".join(lines)


def verify(
    spec: api.Spec,
    strategy: str = "stable",
    only: Globs = (),
    freeze: Globs = (),
    tokens: int = 1,
    seed: int = 0,
    width: int | None = None,
    block: str | None = None,
    components: Iterable[type[Component]] = (),
) -> Verification:
    """Tries the plan of a strategy on every kind of block that differs for the planner.

    Args:
        tokens: how many tokens one static patch serves.
        width: of the residual stream, for designs that write it as a symbol.
        block: the only kind of block to try.

    Raises:
        BadInput: the spec cannot be read, its sizes are too large, or there is no such strategy or block.
    """
    if seed < 0:
        raise BadInput(f"the seed must be at least 0, got {seed}")
    api.graphs_by_kind(spec, components)  # what is wrong with the spec, said with its name
    small = with_small_sizes(api.load(spec, components), width)
    graphs = {"/".join(kinds): graph for kinds, graph in api.distinct_graphs(small, only, freeze).items()}
    if block is not None:
        chosen = {name: g for name, g in graphs.items() if block in name.split("/") or block == name}
        if not chosen:
            raise BadInput(f"there is no block {block!r}{suggest(block, [k for n in graphs for k in n.split('/')])}")
        graphs = chosen
    api.require_positive(tokens)
    tried = tuple(_tried(name, raw_graph(graph), strategy, tokens, seed) for name, graph in graphs.items())
    return Verification(strategy, tokens, seed, tried)


def _tried(name: str, graph: Graph, strategy: str, tokens: int, seed: int) -> BlockTrial:
    try:
        plan = make_plan(graph, strategy, tokens)
    except NotPatchable as error:
        return BlockTrial(name, (), None, None, (), str(error))
    conditions = tuple(f"{c.node}: {c}" for c in plan.route.conditions)
    trial = draw(graph, seed, tokens)
    try:
        result = solve(trial, plan)
    except ConditionViolated as error:
        return BlockTrial(name, plan.route.parameters, None, None, conditions, f"a condition does not hold: {error}")
    found = [result.relative_linf, result.unpatched_relative]
    left, before = (value if np.isfinite(value) else None for value in found)
    reason = "" if left is not None and left <= EXACT else f"the edited block is off by {found[0]:.2g}, relative"
    return BlockTrial(name, plan.route.parameters, left, before, conditions, reason, trial, result)


def dump_arrays(tried: BlockTrial) -> dict[str, np.ndarray]:
    """All that it takes to recheck a tried block without this kit, by the names that the README gives.

    Raises:
        NotPatchable: there is no patch to recheck.
    """
    trial, result = tried.trial, tried.result
    if trial is None or result is None:
        raise NotPatchable(f"there is nothing to recheck: {tried.reason}")

    def rows(value: np.ndarray) -> np.ndarray:
        return value[0] if trial.tokens == 1 else value

    found: dict[str, Any] = {"graph": json.dumps(graph_document(trial.graph)), "input": rows(trial.input)}
    found |= {f"parameter/{n}": v for n, v in trial.parameters.items()}
    found |= {f"patched/{n}": v for n, v in result.patched_parameters.items()}
    for name, mixing in trial.mixing.items():
        found |= _mixing_arrays(trial.graph, name, mixing)
        found[f"mix/{name}/offset/contextual"] = rows(mixing.contextual)
        found[f"mix/{name}/offset/reduced"] = rows(mixing.reduced)
    found["output/contextual"] = rows(result.output_contextual)
    found["output/patched"] = rows(result.output_patched)
    return {name: np.asarray(value) for name, value in found.items()}


def _mixing_arrays(graph: Graph, name: str, mixing: Mixing) -> dict[str, np.ndarray]:
    """The matrices by the position of the argument that each reads (matrices of parameters are not read)."""
    read = [i for i, a in enumerate(graph.node[name].args) if len(graph.shapes[a]) == 1]
    return {f"mix/{name}/matrix/{i}": m for i, m in zip(read, mixing.matrices, strict=True)}


def write_dump(tried: BlockTrial, path: Path) -> None:
    """Writes `dump_arrays` as one `.npz` file, complete or not at all.

    Raises:
        BadInput: the file cannot be written.
        NotPatchable: there is no patch to recheck.
    """
    arrays: dict[str, Any] = dump_arrays(tried)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_file(path, packed.getvalue())
