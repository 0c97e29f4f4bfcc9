"""The numbers of a joint equation: a parameter that reaches the goal in several ways (`blockkit.planner.joint`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..graph.changes import Change, MatrixChange, VectorChange
from ..graph.graph import Graph, Node
from ..graph.ops import MatMul, Multiply, Scale, Slice
from ..planner.route import Step

Rows = np.ndarray  # [tokens, width], float64


@dataclass(frozen=True)
class Map:
    """A linear map to the goal, for every token: element-wise `[tokens, width]`, or `[tokens, goal, width]`."""

    values: np.ndarray

    @property
    def elementwise(self) -> bool:
        return self.values.ndim == 2

    def whole(self) -> np.ndarray:
        if not self.elementwise:
            return self.values
        return np.asarray(self.values[:, :, None] * np.eye(self.values.shape[1]))

    def __add__(self, other: Map) -> Map:
        if self.elementwise and other.elementwise:
            return Map(self.values + other.values)
        return Map(self.whole() + other.whole())

    def after(self, node: Node, position: int, value: Callable[[str], np.ndarray]) -> Map:
        """This map with the node's own, in its argument at `position`, done before it."""
        other = node.args[1 - position : 2 - position]
        match node.op:
            case Scale(alpha=alpha):
                return Map(self.values * alpha)
            case Multiply(offset=offset):
                factor = value(other[0]) + (offset if position == 0 else 0.0)
                return Map(self.values * (factor if self.elementwise else factor[:, None, :]))
            case MatMul():
                weight = value(other[0])[0]
                return Map(self.whole() @ weight)
            case Slice(start=start, stop=stop):
                whole = self.whole()
                placed = np.zeros((*whole.shape[:2], value(node.args[0]).shape[1]))
                placed[:, :, start.known : stop.known] = whole
                return Map(placed)
        return self


def solve_joint(
    step: Step, graph: Graph, residual: Rows, value: Callable[[str], np.ndarray], per_token: bool
) -> Change | np.ndarray:
    """The change of the step's parameter that takes `residual [tokens, goal]` away.

    Args:
        value: a signal's rows `[tokens, width]`, or a parameter repeated for every token.

    Returns:
        the change (of a vector, a row for every token); where there is none, what the best one leaves.
    """
    uses = _uses(step, graph, residual, value)
    if step.is_matrix:
        return _matrix(uses, residual, per_token)
    total = uses[0][0]
    for use, _ in uses[1:]:
        total = total + use
    return _vector(total, residual)


def _uses(
    step: Step, graph: Graph, residual: Rows, value: Callable[[str], np.ndarray]
) -> list[tuple[Map, np.ndarray | None]]:
    """For every use of the parameter: the map from there to the goal, and what a matrix is applied to there."""
    maps: dict[str, Map] = {step.goal: Map(np.ones_like(residual))}
    found: list[tuple[Map, np.ndarray | None]] = []
    for name in reversed(step.region):
        node = graph.node[name]
        if name not in maps:
            continue
        for position, arg in enumerate(node.args):
            if arg == step.parameter and isinstance(node.op, MatMul):
                found.append((maps[name], value(node.args[0])))
            elif arg == step.parameter:
                found.append((maps[name].after(node, position, value), None))
            elif arg in step.region:
                grown = maps[name].after(node, position, value)
                maps[arg] = maps[arg] + grown if arg in maps else grown
    return found


def _vector(total: Map, residual: Rows) -> Change | np.ndarray:
    if total.elementwise:
        bad = (total.values == 0) & (residual != 0)
        if bad.any():
            return np.where(bad, residual, 0.0)
        delta = np.divide(residual, total.values, out=np.zeros_like(residual), where=residual != 0)
    else:
        rows = zip(total.values, residual, strict=True)
        delta = np.stack([np.linalg.lstsq(m, r, rcond=None)[0] for m, r in rows])
        left = residual - np.einsum("tgw,tw->tg", total.values, delta)
        if _misses(left, residual):
            return np.asarray(left)
    return VectorChange(delta, True)


def _matrix(uses: Sequence[tuple[Map, np.ndarray | None]], residual: Rows, per_token: bool) -> Change | np.ndarray:
    """The change a r^T for every token, with r a combination of what the uses read and a the unknown."""
    read = [z for _, z in uses if z is not None]
    combined = np.asarray(sum(_weight(use, uses[0][0]) * z for (use, _), z in zip(uses, read, strict=True)))
    if per_token:
        return _each_token(uses, read, combined, residual)
    tokens, goal = residual.shape
    basis = _directions(combined)
    width = uses[0][0].values.shape[-1]
    system = np.zeros((tokens, goal, len(basis), width))
    for (use, _), z in zip(uses, read, strict=True):
        system += np.einsum("tgw,tb->tgbw", use.whole(), z @ basis.T)
    flat = system.reshape(tokens * goal, -1)
    solved = np.linalg.lstsq(flat, residual.ravel(), rcond=None)[0]
    left = (residual.ravel() - flat @ solved).reshape(residual.shape)
    if _misses(left, residual):
        return np.asarray(left)
    return MatrixChange(solved.reshape(len(basis), width), basis)


def _each_token(
    uses: Sequence[tuple[Map, np.ndarray | None]], read: list[np.ndarray], combined: np.ndarray, residual: Rows
) -> Change | np.ndarray:
    """A change of its own for every token, stacked."""
    stacked: list[MatrixChange] = []
    for t in range(len(residual)):
        row = slice(t, t + 1)
        alone = [(Map(use.values[row]), z[row]) for (use, _), z in zip(uses, read, strict=True)]
        if not residual[t].any():
            stacked.append(MatrixChange(np.zeros((1, uses[0][0].values.shape[-1])), np.zeros_like(combined[row])))
            continue
        found = _matrix(alone, residual[row], False)
        if not isinstance(found, MatrixChange):
            return np.asarray(found)
        stacked.append(found)
    left, right = (np.concatenate(parts) for parts in zip(*((s.left, s.right) for s in stacked), strict=True))
    return MatrixChange(left, right, True)


def _weight(use: Map, first: Map) -> np.ndarray:
    """How much, and with which sign, a use counts beside the first, for every token: `[tokens, 1]`."""
    a, b = (use.values, first.values) if use.elementwise and first.elementwise else (use.whole(), first.whole())
    axes = tuple(range(1, a.ndim))
    size = np.sum(b * b, axis=axes)
    return np.divide(np.sum(a * b, axis=axes), size, out=np.ones_like(size), where=size > 0)[:, None]


def _directions(inputs: np.ndarray) -> np.ndarray:
    """An orthonormal basis `[rank, d_in]` of the rows."""
    _, sizes, vt = np.linalg.svd(inputs, full_matrices=False)
    return np.asarray(vt[sizes > sizes.max(initial=0.0) * max(inputs.shape) * np.finfo(np.float64).eps])


def _misses(left: np.ndarray, residual: np.ndarray) -> bool:
    return bool(np.abs(left).max(initial=0.0) > 1e-6 * np.abs(residual).max(initial=0.0))
