"""The numbers of a step: the residual at the goal, pulled back along the laws to the parameter.

Written once, in float64 NumPy, for every backend: the laws touch vectors of one token (or a few),
never whole activations, and float64 is not to be had on every device. Nothing is divided by zero or
by a stand-in for zero: a condition that does not hold raises `ConditionViolated`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ConditionViolated
from ..graph.changes import Change, MatrixChange, VectorChange
from ..graph.graph import Graph, Node
from ..graph.laws import Action
from ..graph.ops import LEAK, Activation, Add, Multiply, RMSNorm, Scale, Slice
from ..graph.ops.custom import Custom
from ..graph.sizes import Size
from ..planner.analysis.window import Window
from ..planner.route import Link, Step
from .joint import solve_joint
from .sphere import closest_unit_rms

Rows = np.ndarray  # [tokens, width], float64
NOWHERE = np.zeros(0, int)
STEADY = 8.0  # how far a steered direction outweighs what the norm read before: damps rounding by as much


@dataclass(frozen=True)
class Operands:
    """What a step needs of the two runs, rows being the tokens to serve.

    Attributes:
        contextual: values of the contextual run, `[tokens, width]` by node name.
        reduced: actual values of the reduced run under the steps before this one.
        stored: fetches a parameter as the reduced run uses it: `[d_out, d_in]` or `[width]`.
        eps: the rounding unit of the dtype in which the model runs.
    """

    contextual: Mapping[str, Rows]
    reduced: Mapping[str, Rows]
    stored: Callable[[str], np.ndarray]
    eps: float


def reads(step: Step, graph: Graph) -> frozenset[str]:
    """The node values (and the input) that `solve_step` wants from the reduced run."""
    names = {step.goal}
    for name in step.region:
        names.update((name, *graph.node[name].args))
    for link in step.path:  # of a sum, the other terms need not be known: they are what is left
        args = graph.node[link.node].args
        names.update(
            (link.node, *(args[link.position : link.position + 1] if link.law.action is Action.SHIFT else args))
        )
    return frozenset(names - graph.parameter.keys())


def asks(step: Step, graph: Graph) -> frozenset[str]:
    """The node values that `solve_step` wants from the contextual run."""
    turned = {graph.node[link.node].args[0] for link in step.path if link.law.action is Action.DIRECTION}
    return frozenset({step.goal, *turned})


def solve_step(step: Step, graph: Graph, run: Operands, per_token: bool) -> Change:
    """The change of `step.parameter` that gives `step.goal` its contextual value.

    Raises:
        ConditionViolated: a value condition of a law does not hold, or the runs have values that are no numbers.
    """
    _finite(step, graph, run)
    try:
        return _solved(step, graph, run, per_token)
    except np.linalg.LinAlgError as error:
        what = f"its equations have no solution in float64 ({error})"
        raise _violation(step, step.goal, what, NOWHERE, 0.0) from None


def _finite(step: Step, graph: Graph, run: Operands) -> None:
    """Refuses values that are not finite: the block itself has no value there."""
    for values, names in ((run.contextual, asks(step, graph)), (run.reduced, reads(step, graph))):
        for name in sorted(names, key=lambda n: graph.index.get(n, -1)):
            where = np.flatnonzero(~np.isfinite(values[name]).all(axis=0))
            if where.size:
                raise _violation(step, name, "the block's own values are not finite there", where, float("nan"))


def _solved(step: Step, graph: Graph, run: Operands, per_token: bool) -> Change:
    pull = _Pull(step, graph, run)
    if step.region:
        return _joint(step, graph, pull, per_token)
    for link, below in zip(step.path[:-1], step.path[1:], strict=True):
        pull.through(link, below.law.action)
    last = graph.node[step.path[-1].node]
    if step.law.action is Action.WEIGHT:
        wanted = pull.flush(last.name)
        read = pull.value(last.args[0])
        return _weight_change(step, last, read if step.block is None else _most_active(read, step), wanted, per_token)
    pull.through(step.last, None)
    delta = pull.flush(last.name)
    return VectorChange(delta if per_token else _common(step, last, delta), per_token)


def rounding(step: Step, graph: Graph, target: Rows, reduced: Mapping[str, Rows], eps: float) -> Rows:
    """What rounding alone may leave at the step's goal: nothing smaller is worth dividing by anything.

    A target that is a sum carries the rounding of all its terms. `[tokens, width]`.
    """
    size = np.abs(target)
    for link in () if step.region else step.path:
        node = graph.node[link.node]
        if not isinstance(node.op, Add):
            break
        term = node.args[link.position]
        if term not in graph.parameter:
            size = size + np.abs(reduced[link.node] - reduced[term])
    return np.asarray(eps * size)


def _undivided(step: Step) -> bool:
    """Whether the residual reaches a matrix as it is: nothing on the way can make a small part of it large."""
    return (
        bool(step.path) and not step.region and {link.law.action for link in step.path} <= {Action.SHIFT, Action.WEIGHT}
    )


class _Pull:
    """A residual on its way upstream; linear laws are collected and inverted together."""

    def __init__(self, step: Step, graph: Graph, run: Operands) -> None:
        self.step, self.graph, self.run = step, graph, run
        target, actual = run.contextual[step.goal], run.reduced[step.goal]
        residual = target - actual
        small = np.abs(residual) <= rounding(step, graph, target, run.reduced, run.eps)
        if _undivided(step):  # then a part of a row that is wanted at all costs nothing
            small = small.all(axis=1, keepdims=True)
        self.residual = np.where(small, 0.0, residual)
        self.matrix: np.ndarray | None = None  # [rows, width], or [tokens, rows, width]
        self.diagonal: np.ndarray | float = 1.0  # [tokens, width], right of the matrix

    def value(self, name: str) -> Rows:
        if name in self.graph.parameter:
            rows = len(self.residual)
            return np.broadcast_to(self.run.stored(name), (rows, *self.run.stored(name).shape))
        return self.run.reduced[name]

    def through(self, link: Link, below: Action | None) -> None:
        """Moves the residual from the result of the link's node to its argument."""
        name, position, action = link.node, link.position, link.law.action
        node = self.graph.node[name]
        match action:
            case Action.SHIFT:
                return
            case Action.SCALE if isinstance(node.op, Scale):
                self.diagonal = self.diagonal * node.op.alpha
            case Action.DIVIDE if below is Action.DIRECTION:
                self._turn(node, position)
            case Action.DIVIDE if isinstance(node.op, Multiply):
                other = self.value(node.args[1 - position])
                self.diagonal = self.diagonal * (other + node.op.offset if position == 0 else other)
            case Action.THROUGH:
                weight = self.run.stored(node.args[1])
                plain = self.matrix is None and isinstance(self.diagonal, float) and self.diagonal == 1.0
                self.matrix = weight if plain else self._folded() @ weight
                self.diagonal = 1.0
            case Action.PLACE:
                self._place(node, position)
            case Action.INVERT if isinstance(node.op, Activation):
                wanted = self.value(name) + self.flush(name)
                argument = self.value(node.args[0])
                inverse = np.where(wanted < 0, wanted / LEAK, wanted) if node.op.fn == "leaky_relu" else wanted
                self.residual = inverse - argument
                self._pick(link.window)
            case Action.INVERT if isinstance(node.op, Custom):
                self._declared(node, node.op, position)
            case Action.DIRECTION:
                return  # done together with the scale above it
            case _:
                raise TypeError(f"no rule for {action} at {name}")

    def _folded(self) -> np.ndarray:
        """The collected linear map with its diagonal multiplied in."""
        matrix = self.matrix if self.matrix is not None else np.eye(self.residual.shape[1])
        if isinstance(self.diagonal, float):
            return matrix * self.diagonal
        return np.asarray(matrix * self.diagonal[:, None, :])

    def _place(self, node: Node, position: int) -> None:
        """Through a slice, or one part of a concatenation: columns of the collected map, or zeros beside them."""
        folded = self._folded()
        if isinstance(node.op, Slice):
            placed = np.zeros((*folded.shape[:-1], self.value(node.args[0]).shape[1]))
            placed[..., node.op.start.known : node.op.stop.known] = folded
        else:
            first = sum(self.value(a).shape[1] for a in node.args[:position])
            placed = folded[..., first : first + self.value(node.args[position]).shape[1]]
        self.matrix, self.diagonal = placed, 1.0

    def _pick(self, window: Window | None) -> None:
        """Leaves only the coordinates that the target reaches, after an inverse has given definite numbers."""
        width = self.residual.shape[1]
        if window is not None and window != Window.whole(Size.of(width)):
            kept = slice(window.start.known, window.stop.known)
            self.residual, self.matrix = self.residual[:, kept], np.eye(width)[kept]

    def _declared(self, node: Node, op: Custom, position: int) -> None:
        """Through an operation of a user's own, by the law declared for it."""
        residual, argument = self.flush(node.name), self.value(node.args[position])
        args = [self.run.stored(a) if len(self.graph.shapes[a]) == 2 else self.value(a) for a in node.args]
        solved = op.solve(position, self.value(node.name) + residual, args)
        solved = np.where(residual.any(axis=1, keepdims=True), solved, argument)  # nothing is asked of these rows
        if not np.isfinite(solved).all():
            where = np.flatnonzero(~np.isfinite(solved).all(axis=0))
            what = f"the law of {op.kind} gives no finite {node.args[position]}"
            raise self._violated(node.name, what, where, float(np.abs(residual).max()))
        self.residual = solved - argument

    def _turn(self, node: Node, position: int) -> None:
        """Through scale and norm at once: the unit-RMS direction closest to the target (see `sphere`)."""
        norm = self.graph.node[node.args[position]]
        if not isinstance(node.op, Multiply) or not isinstance(norm.op, RMSNorm):
            raise TypeError(f"{node.name} is not a norm under a scale")
        wanted = self.value(node.name) + self.flush(node.name)
        factor = self.value(node.args[1 - position]) + (node.op.offset if position == 0 else 0.0)
        fed = np.stack([self.run.contextual[norm.args[0]], self.value(norm.args[0])])
        size = STEADY * np.sqrt(np.mean(fed**2, axis=2, keepdims=True)).max(axis=0)
        if np.any(size == 0):
            raise self._violated(norm.args[0], "the norm's input is exactly zero", np.zeros(0, int), 0.0)
        turned = np.stack([closest_unit_rms(m, g) for m, g in zip(factor, wanted, strict=True)])
        self.residual = size * turned - self.value(norm.args[0])

    def flush(self, node: str) -> Rows:
        """Inverts the collected linear map: afterwards the residual is that of the value it acts on."""
        if self.matrix is None:
            if isinstance(self.diagonal, np.ndarray):
                self.residual = self._divided(node, self.residual, self.diagonal)
            else:
                self.residual = self.residual / self.diagonal
        else:
            folded = self._folded()
            if folded.ndim == 2:
                self.residual = self._least_norm(node, folded, self.residual)
            else:
                rows = zip(folded, self.residual, strict=True)
                self.residual = np.stack([self._least_norm(node, m, r[None])[0] for m, r in rows])
        self.matrix, self.diagonal = None, 1.0
        return self.residual

    def _divided(self, node: str, residual: Rows, factor: Rows) -> Rows:
        bad = (factor == 0) & (residual != 0)
        if bad.any():
            where = np.flatnonzero(bad.any(axis=0))
            size = float(np.abs(residual[bad]).max())
            raise self._violated(node, "a factor is exactly zero where its product has to change", where, size)
        return np.divide(residual, factor, out=np.zeros_like(residual), where=residual != 0)

    def _least_norm(self, node: str, matrix: np.ndarray, residual: Rows) -> Rows:
        solution = np.linalg.lstsq(matrix, residual.T, rcond=None)[0].T
        left = np.abs(solution @ matrix.T - residual)
        if left.max(initial=0.0) > 1e-6 * np.abs(residual).max(initial=0.0):
            where = np.flatnonzero((left > 1e-6 * np.abs(residual).max()).any(axis=0))
            raise self._violated(node, "a known matrix on the way lacks full row rank", where, float(left.max()))
        return np.asarray(solution)

    def _violated(self, node: str, what: str, where: np.ndarray, size: float) -> ConditionViolated:
        return _violation(self.step, node, what, where, size)


def _violation(step: Step, node: str, what: str, where: np.ndarray, size: float) -> ConditionViolated:
    shown = tuple(int(i) for i in where[:8])
    more = f" and {len(where) - 8} more" if len(where) > 8 else ""
    at = f" (coordinates {', '.join(map(str, shown))}{more})" if shown else ""
    message = (
        f"cannot solve for {step.parameter} at node {node!r}: {what}{at}; "
        f"the change asked for there is {size:.3g}. Choose another strategy"
    )
    return ConditionViolated(message, node=node, parameter=step.parameter, coordinates=shown, size=size)


def _joint(step: Step, graph: Graph, pull: _Pull, per_token: bool) -> Change:
    """A parameter with several ways to the goal; see `blockkit.solve.joint`."""
    found = solve_joint(step, graph, pull.residual, pull.value, per_token)
    if isinstance(found, np.ndarray):
        size = np.abs(found).max(axis=0)
        where = np.flatnonzero(size > 1e-6 * size.max())
        raise _violation(step, step.goal, "what it is multiplied by does not add up to full rank", where, size.max())
    if isinstance(found, VectorChange) and not per_token:
        return VectorChange(_common(step, graph.node[step.goal], found.delta))
    return found


def _most_active(z: Rows, step: Step) -> Rows:
    """What stacked experts read, `[tokens, experts*width]`, with all but the most active expert's part left out."""
    width = step.block.known if step.block is not None and step.block.known else z.shape[1]
    parts = z.reshape(len(z), -1, width)
    best = np.argmax(np.sum(_by_largest(z)[0].reshape(parts.shape) ** 2, axis=2), axis=1)
    kept = np.zeros_like(parts)
    kept[np.arange(len(z)), best] = parts[np.arange(len(z)), best]
    return kept.reshape(z.shape)


def _by_largest(z: Rows) -> tuple[Rows, Rows]:
    """Rows divided by their largest coordinate, and that `[tokens, 1]`: the square of a tiny number would be zero."""
    largest = np.abs(z).max(axis=1, keepdims=True)
    return np.divide(z, largest, out=np.zeros_like(z), where=largest > 0), largest


def _weight_change(step: Step, node: Node, z: Rows, wanted: Rows, per_token: bool) -> MatrixChange:
    """Least-norm dW with dW z_t = wanted_t for every token t: rank-1 for one token, jointly for many."""
    moving = wanted.any(axis=1)
    zero = moving & ~z.any(axis=1)
    if zero.any():
        size = float(np.abs(wanted[zero]).max())
        raise _violation(step, node.name, f"its input {node.args[0]!r} is exactly zero", np.zeros(0, int), size)
    if per_token or len(z) == 1:
        unit, largest = _by_largest(z)
        squares = np.sum(unit**2, axis=1, keepdims=True) * largest
        return MatrixChange(wanted, np.divide(unit, squares, out=np.zeros_like(z), where=squares > 0), per_token)
    _, sizes, vt = np.linalg.svd(z, full_matrices=False)
    kept = sizes > sizes[0] * max(z.shape) * np.finfo(np.float64).eps
    right = vt[kept].astype(np.float32).astype(np.float64)  # as patches hold it: `left` then makes up for its rounding
    left = np.linalg.lstsq(z @ right.T, wanted, rcond=None)[0]
    missed = np.abs(z @ right.T @ left - wanted)
    asked = np.abs(wanted).max(axis=1, keepdims=True)  # of each token: a small target is no less a target
    allowed = 1e-6 * asked + 1e-12 * asked.max()
    if np.any(missed > allowed):
        where = np.flatnonzero((missed > allowed).any(axis=0))
        what = f"the {len(z)} tokens' inputs {node.args[0]!r} have rank {int(kept.sum())} only"
        raise _violation(step, node.name, what, where, float(missed.max()))
    return MatrixChange(left, right)


def _common(step: Step, node: Node, delta: Rows) -> np.ndarray:
    """The one shift that serves all tokens, if they ask for the same one."""
    first = delta[0]
    differ = np.abs(delta - first).max(axis=0)
    allowed = 1e-9 * np.abs(delta).max()
    if differ.max() > allowed:
        where = np.flatnonzero(differ > allowed)
        raise _violation(step, node.name, "the tokens ask for different values", where, float(differ.max()))
    return np.asarray(first)
