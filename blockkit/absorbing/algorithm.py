"""Algorithm 1 (arXiv 2511.17864) in lock-step: absorb a context into a model's weights, block by block.

The contextual and the reduced sequence go through each block as one packed run, so that each weight
is read once for both, and only the current block's values are kept. At every block the plan's steps
are solved from the reduced run's *actual* values, and the patched block's own output goes on to the
next block, which takes up what rounding left. That holds in the arithmetic in which it was solved: another
program's rounding is amplified by as much as the plan is ill-conditioned. What is reported is an
ordinary run of the edited model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..display import tagged
from ..errors import BadInput
from ..graph.arrays import Array
from ..planner.plan import Plan, make_plan
from ..progress import Progress, silent
from .executor import Executor, Overlays
from .lockstep import BlockStepper, Stepped
from .metrics import Comparison, compare
from .proof import require_exact
from .request import Request
from .run import Edits, logits_of, remembered, run_stream, sees_later


@dataclass(frozen=True)
class Absorbed:
    """A context as changed parameters, with what the edited model's own run shows.

    Attributes:
        overlays: the changes, by layer and parameter.
        contextual: logits of the contextual run, `[served, vocabulary]`.
        patched: logits of an ordinary run of the edited model, `[served, vocabulary]`.
        measured: how far the two are apart.
        stream: the contextual run's residual stream after the last block, `[served, d_model]`.
        residual_by_block: for each block, max |y_R - y_C| / max |y_C| over the served tokens.
        seconds: time by stage.
    """

    request: Request
    plans: Mapping[str, Plan]
    overlays: Overlays
    contextual: np.ndarray
    patched: np.ndarray
    measured: Comparison
    stream: np.ndarray
    residual_by_block: tuple[float, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(map(len, self.overlays.values()))
        return tagged(self, f"{len(self.request.context)} tokens in {count} changes, linf {self.measured.linf:.2g}")


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
    report = progress or silent
    clock = time.perf_counter()
    plans = plan_layers(executor, request, strategy)
    steps, stream = lock_step(executor, plans, request, report)
    overlays = {layer: step.overlay for layer, step in enumerate(steps)}
    solved = time.perf_counter()
    report("running the edited model", 0.0)
    edits = {layer: step.edited for layer, step in enumerate(steps)}
    own = run_query(executor, request, overlays, edits)[request.served[0] :]
    together = logits_of(executor, executor.arrays.concatenate([stream, own], axis=0))
    contextual, patched = np.split(together, 2)
    done = time.perf_counter()
    measured = compare(patched, contextual)
    require_exact(measured, contextual, executor.dtype)
    seconds = {"absorb": solved - clock, "edited_run": done - solved}
    residuals = tuple(step.residual for step in steps)
    kept = executor.host(stream)
    return Absorbed(request, plans, overlays, contextual, patched, measured, kept, residuals, seconds)


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
) -> tuple[list[Stepped], Array]:
    """Both runs through all blocks; gives what each block gave, and the contextual stream at the served rows."""
    n, q, depth = len(request.context), len(request.query), executor.depth
    everything = np.concatenate([request.context, request.query, request.query])
    stream = executor.embed(everything, np.concatenate([np.arange(n + q), request.reduced_positions]))
    contextual, reduced = stream[: n + q], stream[n + q :]
    steppers = {kind: BlockStepper(executor, plan, request, n) for kind, plan in plans.items()}
    steps: list[Stepped] = []
    causal = not sees_later(executor)
    for layer in range(depth):
        report("absorbing", layer / depth)
        kind, past = executor.architecture.kind_at(layer), None
        stepper = steppers[kind]
        if layer == depth - 1 and causal:  # after it, the context's own rows are of no use to anyone
            past = remembered(executor, layer, contextual[:n], executor.positions(np.arange(n)))[0]
            contextual, stepper = contextual[n:], BlockStepper(executor, plans[kind], request, 0)
        steps.append(stepper.absorb(layer, contextual, reduced, past))
        contextual, reduced = steps[-1].contextual, steps[-1].reduced
    return steps, contextual[-len(request.served) :]


def run_query(
    executor: Executor, request: Request, overlays: Overlays | None, edited: Edits | None = None, factored: bool = False
) -> Array:
    """The edited model on the query alone, at its positions: an ordinary run, with merged weights if it has any."""
    merge = request.merge and not factored
    return run_stream(executor, request.query, request.reduced_positions, overlays, merge, edited=edited)
