"""Algorithm 1 (arXiv 2511.17864) inside the model's own forward.

The contextual run shows every block's target. The reduced run then solves each step of a block's plan at the moment
when the model's code reads that parameter, from the run's actual values up to there, and goes on with what the changed
parameter gives: one reduced run patches every block, and the next block starts from the patched block's own output.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from blockkit.absorbing.lockstep import EPS
from blockkit.errors import BadInput, ConditionViolated, NotPatchable
from blockkit.graph.changes import Change, MatrixChange, VectorChange, dense, narrowed, plus
from blockkit.graph.graph import Graph, listed
from blockkit.planner.route import Step
from blockkit.solve.step import Operands, solve_step

from ..blocks.traced import Traced, in_context
from ..blocks.translate import STREAM, Tap
from ..calling.token_rows import TOKENS_FIRST
from ..editing.changed import Factors, changed_result, merged_value
from ..watching.intercepted import Event
from ..watching.observe import Chosen, Values, choose
from ..watching.watcher import Again, Finished, Seen, Watcher, host

SAME = 1e-3  # relative difference up to which two residual streams are one, but for rounding


@dataclass(frozen=True)
class Task:
    """What is asked of a reduced run.

    Attributes:
        strategy: how routes are chosen; None for the default.
        per_row: each served row has a change of its own, in place of one for all.
        per_token: then these are rows of tokens, in place of one row for each sequence.
        merge: changes are rounded into the weights, in place of being kept beside them as factors.
        ignored: `[rows]`, rows that hold padding; None where there are none.
        frozen: parameters that may not move, by name in the block.
        batch: how many sequences there are.
        twice: whether blocks may run more than once (they may not where they remember what they read).
    """

    strategy: str | None
    per_row: bool
    merge: bool
    per_token: bool = False
    ignored: np.ndarray | None = None
    frozen: tuple[str, ...] = ()
    batch: int = 1
    twice: bool = True


def plans(traced: Traced, task: Task, capacity: int | None) -> tuple[Traced, dict[int, Chosen | None]]:
    """A plan for every block whose input is restored; None where there is none, which a later block may make up for.

    What comes behind the last block is planned only if the blocks leave something to it; it is then one of them.

    Raises:
        BadInput: a glob of frozen parameters matches none.
        NotPatchable: something is left to the end.
    """
    names = {name: None for block in traced.blocks for name in block.graph.parameter}
    for pattern in task.frozen:
        if not fnmatch.filter(names, pattern):
            raise BadInput(f"{pattern!r} matches no parameter of a block; there are {listed(names)}")
    known: dict[Graph, Chosen | NotPatchable] = {}
    found: dict[int, Chosen | None] = {}
    problem: NotPatchable | None = None
    blocks = traced.blocks if traced.after is None else (*traced.blocks, traced.after)
    for place, block in enumerate(blocks):
        if place == len(traced.blocks) and problem is None:
            return traced, found
        graph = block.graph if problem is None else in_context(block.graph)
        if graph not in known:
            known[graph] = _chosen(graph, block.taps, task, capacity)
        chosen = known[graph]
        if place == 0 and isinstance(chosen, Chosen):
            chosen = _watching_more(chosen, _chosen(in_context(block.graph), block.taps, task, capacity), block.taps)
        found[place] = chosen if isinstance(chosen, Chosen) else None
        if isinstance(chosen, Chosen):
            problem = None
        elif problem is None:
            problem = NotPatchable(f"{block.path or 'the model'}: {chosen}")
    if problem is not None:
        raise problem
    return replace(traced, blocks=blocks), found


def _watching_more(chosen: Chosen, other: Chosen | NotPatchable, taps: tuple[Tap, ...]) -> Chosen:
    """The plan, with what another needs: that for a stream that differs as it enters (by places a model counts)."""
    if isinstance(other, NotPatchable):
        return chosen
    return replace(chosen, taps=tuple(t for t in taps if t in chosen.taps or t in other.taps))


def _chosen(graph: Graph, taps: tuple[Tap, ...], task: Task, capacity: int | None) -> Chosen | NotPatchable:
    apart: set[str] = set()
    for tap in taps if task.per_row else ():
        if not tap.by_row or (task.batch > 1 and tap.output[1] == TOKENS_FIRST):
            apart |= tap.parameters & graph.parameter.keys()
    try:
        held = tuple(p for p in task.frozen if fnmatch.filter(graph.parameter, p))
        return choose(graph, taps, task.strategy, capacity, (*held, *apart), task.twice)
    except NotPatchable as error:
        if not apart:
            return error
        return NotPatchable(
            f"{error}; the model reads {listed(sorted(apart), 4)} with its rows in another order, so that these cannot "
            "have values for each token or prompt: absorb prompts one at a time, or with tokens='all'"
        )


class NeverRead(NotPatchable):
    """No call of the run that can be watched read a parameter, so that another one has to be chosen.

    Attributes:
        parameter: its name in the block.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass
class Solver(Watcher):
    """The reduced run: solves for a parameter when it is read.

    Attributes:
        task: what is asked.
        target: what the contextual run showed, by place.
        capacity: how many tokens one static change has to serve; None where each has its own.
        dtype: in which the model computes.
        changes: the changes found, by name in the state dict.
        strategies: those of the plans that were carried out.
        length: how many tokens each sequence of the run has.
        stop: whether the forward ends with the last block; what comes after it is of no use then.
    """

    task: Task = field(default_factory=lambda: Task(None, False, False))
    target: Mapping[int, Seen] = field(default_factory=dict)
    capacity: int | None = 1
    dtype: str = "float32"
    stored: Callable[[str], Tensor] = field(default=lambda name: torch.empty(0))
    changes: dict[str, Change] = field(default_factory=dict)
    using: dict[int, Chosen] = field(default_factory=dict)
    strategies: set[str] = field(default_factory=set)
    stop: bool = True
    length: int = 0

    def entered(self, place: int, stream: Tensor) -> None:
        """See `Watcher`; a stream that is not the contextual one is a block's own matter to make up for."""
        super().entered(place, stream)
        chosen = self.chosen.get(place)
        if chosen is None:
            return
        mine, wanted = (seen[place].shown[STREAM] for seen in (self.seen, self.target))
        graph = self.traced.blocks[place].graph
        differs = _apart(mine, wanted, self.task.ignored) > max(SAME, 8 * EPS[self.dtype])
        if differs and chosen.plan.graph.input == graph.input:
            block = self.traced.blocks[place]
            found = _chosen(in_context(graph), block.taps, self.task, self.capacity)
            if isinstance(found, NotPatchable):
                raise NotPatchable(
                    f"{block.path or 'the model'}: what it reads differs between the two runs (positions or other "
                    f"inputs are not the same), and then {found}"
                )
            chosen = found
        self.using[place] = chosen

    def left(self, place: int, stream: Tensor, again: Again) -> Tensor | None:
        """See `Watcher`; carries out a plan that needed the whole block."""
        super().left(place, stream, again)
        chosen, found = self.using.get(place), None
        if chosen is not None and chosen.late:
            self.strategies.add(chosen.plan.strategy)
            for step in chosen.plan.route.steps:
                self._solve(chosen, step)
                self.seen[place] = Seen({STREAM: self.seen[place].shown[STREAM]})
                found = again()
                super().left(place, found, again)
        if self.stop and place == len(self.traced.blocks) - 1:
            raise Finished
        return found

    def read(self, tap: Tap, event: Event) -> Tensor | None:
        """Solves the steps that move what this call reads, and gives what it then gives."""
        output = event.output
        chosen = self.using.get(self.place)
        if chosen is not None and chosen.late:
            output = self._changed(tap, event)
            self.note(tap, event, output)
            return output
        self.note(tap, event, output)
        steps = [s for s in chosen.plan.route.steps if s.parameter in tap.parameters] if chosen is not None else []
        if chosen is None or not steps:
            return None
        for step in steps:
            self._solve(chosen, step)
            output = self._changed(tap, event)
            self.seen[self.place].shown[tap.output[0]] = self.rows.of(output, tap.output[1]).clone()
        self.strategies.add(chosen.plan.strategy)
        return output

    def _solve(self, chosen: Chosen, step: Step) -> None:
        name = self.traced.blocks[self.place].full(step.parameter)
        self.changes[name] = plus(self.changes.get(name), narrowed(self.solved(chosen, step), self.dtype))

    def solved(self, chosen: Chosen, step: Step) -> Change:
        """What the actual values still ask of the step's parameter."""
        graph, block = chosen.plan.graph, self.traced.blocks[self.place]
        actual = self._values(graph, self.seen[self.place])
        run = Operands(self._wanted(graph, actual), actual, self._stored, EPS[self.dtype])
        try:
            change = solve_step(step, graph, run, self.task.per_row)
            return self._for_all_rows(change) if change.per_token and self.task.per_token else change
        except ConditionViolated as error:
            raise ConditionViolated(
                f"{block.path or 'the model'}: {error}",
                node=error.node, parameter=block.full(step.parameter), coordinates=error.coordinates, size=error.size,
            ) from None  # fmt: skip

    def _for_all_rows(self, change: Change) -> Change:
        """Changes for each served token as changes for each token of the run: none for those before them."""
        batch, served, before = self.rows.batch, self.rows.tokens, self.length - self.rows.tokens

        def widened(rows: np.ndarray) -> np.ndarray:
            each = rows.reshape(batch, served, -1)
            return np.concatenate([np.zeros((batch, before, each.shape[-1])), each], 1).reshape(batch * self.length, -1)

        if not before:
            return change
        if isinstance(change, MatrixChange):
            return MatrixChange(widened(change.left), widened(change.right), True)
        return VectorChange(widened(change.delta), True)

    def require_all(self) -> None:
        """Refuses a run in which a parameter of a plan was never read.

        Raises:
            NeverRead: with its name.
        """
        for place, chosen in self.using.items():
            for step in chosen.plan.route.steps:
                if (name := self.traced.blocks[place].full(step.parameter)) not in self.changes:
                    raise NeverRead(step.parameter, f"the model's own run never read {name}")

    def _values(self, graph: Graph, seen: Seen) -> Values:
        shown = {n: host(v) for n, v in seen.shown.items() if n in graph.node or n == graph.input}
        return Values(graph, shown, _Parameters(graph, self._stored))

    def _wanted(self, graph: Graph, actual: Values) -> Mapping[str, np.ndarray]:
        """The contextual values; of rows that hold padding, the actual ones, so that nothing is asked of them."""
        wanted = self._values(graph, self.target[self.place])
        return wanted if self.task.ignored is None else _Masked(wanted, actual, self.task.ignored)

    def _stored(self, parameter: str) -> np.ndarray:
        """A parameter of the current block as the reduced run uses it, `[d_out, d_in]` or `[width]`."""
        block = self.traced.blocks[self.place]
        name = block.full(parameter)
        original = block.value(parameter, self.stored)
        found = np.asarray(original.detach().to(device="cpu", dtype=torch.float64).numpy())
        change = self.changes.get(name)
        return dense(found, change) if change is not None and not self.task.per_row else found

    def _changed(self, tap: Tap, event: Event) -> Tensor:
        """What the call gives with the changes found so far."""
        block = self.traced.blocks[self.place]
        moved = {n: self.changes[n] for p in sorted(tap.parameters) if (n := block.full(p)) in self.changes}
        lies = {block.full(p): block.stored[p] for p in tap.parameters if p in block.stored}
        if self.task.merge:
            values = {n: merged_value(self.stored(n), c, lies[n].transposed) for n, c in moved.items()}
            return event.with_values(values)
        turned = [n for n in moved if lies[n].transposed]
        return changed_result(event, moved, turned, self.rows.batch, self.stored, Factors())


class _Parameters(Mapping[str, np.ndarray]):
    """A block's parameters, fetched when asked for."""

    def __init__(self, graph: Graph, fetch: Callable[[str], np.ndarray]) -> None:
        self.graph, self.fetch = graph, fetch

    def __getitem__(self, name: str) -> np.ndarray:
        return self.fetch(name)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.graph.parameter)

    def __len__(self) -> int:
        return len(self.graph.parameter)


class _Masked(Mapping[str, np.ndarray]):
    """Contextual values, with the actual ones in some rows."""

    def __init__(self, wanted: Values, actual: Values, ignored: np.ndarray) -> None:
        self.wanted, self.actual, self.ignored = wanted, actual, ignored

    def __getitem__(self, name: str) -> np.ndarray:
        return np.where(self.ignored[:, None], self.actual[name], self.wanted[name])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)


def _apart(mine: Tensor, wanted: Tensor, ignored: np.ndarray | None) -> float:
    """max |mine - wanted| / max |wanted| over the rows that count."""
    if ignored is not None:
        kept = torch.as_tensor(~ignored, device=mine.device)
        mine, wanted = mine[kept], wanted[kept]
    size = wanted.abs().max()
    apart = (mine.float() - wanted.float()).abs().max()
    return float(apart / size) if size else float(apart)
