"""Norms and activations that a model writes out in smaller operations, recognised by what they give."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from blockkit.graph.ops import Activation, Concat, LayerNorm, Op, RMSNorm, Scale, Slice
from blockkit.graph.sizes import Size

from ..calling.token_rows import rows_of
from .draft import Draft, applied, base_of, same
from .regions import between
from .rules import MOST_PARTS
from .values import Known

ENDS = ("mul", "div", "pow", "square")  # operations that a norm or an activation ends with
ACTIVATIONS = ("gelu_tanh", "gelu", "quick_gelu", "silu", "relu2")
MOST_SOURCES = 16  # values looked back to for what it was made of
NEAR = 8  # operations looked back over for the epsilon of a norm


def recognised(draft: Draft, node: fx.Node, axis: int) -> str | None:
    """The graph's name of the rows, where the node is the last operation of a norm or an activation."""
    if base_of(node) not in ENDS:
        return None
    wanted = draft.rows_of(node, axis)
    parts = parts_of(draft, node, axis)
    for name in reversed(list(draft.sources(node, MOST_SOURCES))):  # the whole of it, not its end
        if draft.rows[name].shape != wanted.shape:
            continue
        for ops in _candidates(node, wanted.shape[1] // parts, parts):
            if same(_chained(ops, draft.rows[name], parts), wanted) and _holds(draft, node, name, ops, axis, parts):
                return _added(draft, node, name, ops, parts)
    return None


def parts_of(draft: Draft, node: fx.Node, axis: int) -> int:
    """Of how many vectors a token's row consists, over each of which a norm may be taken (heads)."""
    shape = draft.exported.values[node].shape
    return int(np.prod(shape[axis + 1 : -1])) if axis < len(shape) - 1 else 1


def _chained(ops: tuple[Op, ...], rows: np.ndarray, parts: int) -> np.ndarray:
    each = rows.reshape(len(rows) * parts, -1)
    for op in ops:
        each = applied(op, [each])
    return each.reshape(rows.shape)


def _added(draft: Draft, node: fx.Node, name: str, ops: tuple[Op, ...], parts: int) -> str:
    rows = draft.rows[name]
    if parts == 1 or isinstance(ops[0], Activation):
        for op in ops:
            name = draft.add(node, op, (name,), getattr(op, "fn", op.kind), applied(op, [draft.rows[name]]))
        return name
    width = rows.shape[1] // parts
    found = []
    for start in range(0, rows.shape[1], width):
        part = Slice(Size.of(start), Size.of(start + width))
        piece = draft.add(node, part, (name,), "slice", rows[:, start : start + width])
        found.append(_added(draft, node, piece, ops, 1))
    return draft.add(node, Concat(), tuple(found), "concat", _chained(ops, rows, parts))


def _candidates(node: fx.Node, width: int, parts: int) -> Iterator[tuple[Op, ...]]:
    """Activations; and norms, of mean or of sum, with the epsilons that stand in the program near the node."""
    for fn in ACTIVATIONS:
        yield (Activation(fn),)
    if parts > MOST_PARTS:
        return
    near, stack = [node], [node]
    for _ in range(NEAR):
        stack = list(dict.fromkeys(a for n in stack for a in n.all_input_nodes if a.op == "call_function"))
        near.extend(stack)
    literals = {float(a) for n in near for a in (*n.args, *n.kwargs.values()) if isinstance(a, float) and 0 < a < 0.1}
    for eps in (*sorted(literals, reverse=True), 0.0):
        yield (RMSNorm(eps),)
        yield (LayerNorm(eps),)
        yield RMSNorm(eps / width), Scale(width**-0.5)


def _holds(draft: Draft, node: fx.Node, name: str, ops: tuple[Op, ...], axis: int, parts: int) -> bool:
    """Whether a norm is right for small numbers as well, where its epsilon shows."""
    source = draft.made_by[name]
    form = draft.form(source)
    if isinstance(ops[0], Activation):
        return True
    if not isinstance(form, Known) or form.name != name:
        return False
    small = draft.exported.values[source] * max(getattr(ops[0], "eps", 0.0), 1e-16) ** 0.5
    found = draft.exported.replay(between(draft, source, node), {source: small})[node]
    wanted = _chained(ops, rows_of(small, form.axis).double().numpy(), parts)
    return same(rows_of(found, axis).double().numpy(), wanted, 1e-3)
