"""From an exported block to a graph of primitive operations, each held against numbers.

Every value of the program is followed as rows, one vector a token. An operation becomes a primitive only if that
primitive gives the very rows that the program gave for random numbers; so orientation, order of features and epsilons
are facts, not guesses. What no primitive describes becomes an `Opaque` node if a token's row depends on that token
alone, and a `Mix` node if it does not, which is tried on perturbed rows. A value that is no rows at all (attention
scores, tokens sorted by expert) stays inside the next node that is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor, fx

from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Add, MatMul, Multiply, Op, Scale, Slice
from blockkit.graph.sizes import Size

from ..calling.token_rows import rows_of, token_axis
from .decomposed import recognised
from .draft import FILLS, Draft, base_of
from .exported import Exported
from .regions import mixes, region
from .rules import proposals
from .unnamed import unnamed
from .values import STREAM, Constant, Form, Known, Raw, Stored, Tap, Translation

MOVES = frozenset(
    ["view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "contiguous", "clone",
     "to", "_to_copy", "type_as", "alias", "detach", "slice", "select", "narrow", "getitem", "flatten", "unflatten",
     "dropout", "movedim", "t", "mT", "numpy_T", "lift_fresh_copy", "repeat_interleave", "repeat", "chunk", "split"]
)  # operations that put numbers elsewhere, if they do anything at all  # fmt: skip
NO_ROWS = ("", 0)  # what a tap gives that the graph has no name for


def translate(exported: Exported) -> Translation:
    """The graph of the block, its taps, and how its parameters lie in their tensors."""
    draft = Draft(exported)
    taps: list[Tap] = []
    for node in exported.nodes:
        draft.forms[node] = _form(draft, node)
        draft.follow(node, token_axis(exported.values[node], exported.tokens))
        taps.extend(_tap(draft, node))
    output = draft.signal(exported.output)
    if output is None or output == STREAM:
        output = draft.add(exported.output, Scale(1.0), (STREAM,), "identity", draft.rows[STREAM])
    _fold(draft, taps)
    kept = _relevant(draft, output)
    parameters = _parameters(draft, kept)
    graph = Graph.build(STREAM, output, Size.of(draft.rows[STREAM].shape[1]), parameters, kept)
    return Translation(graph, tuple(taps), {p.name: draft.stored[p.name] for p in parameters})


def _form(draft: Draft, node: fx.Node) -> Form:
    """What is known of an operation's result."""
    inputs = [draft.form(n) for n in node.all_input_nodes]
    value = draft.exported.values[node]
    if all(isinstance(f, Constant) for f in inputs):
        constants = [f for f in inputs if isinstance(f, Constant)]
        return Constant(tuple(dict.fromkeys(p for f in constants for p in f.of)), any(f.given for f in constants))
    if base_of(node) in FILLS or (isinstance(value, Tensor) and not value.numel()):
        return Constant()
    axis = token_axis(value, draft.tokens)
    if axis is None:
        return Raw()
    if value.is_floating_point() and not any(isinstance(f, Raw) for f in inputs):
        found = _named(draft, node, axis)
        if found is not None:
            return replace(found, axis=axis)
    elif value.is_floating_point() and (same := _moved(draft, node, axis)):
        return same
    return _unnamed(draft, node, axis)


def _named(draft: Draft, node: fx.Node, axis: int) -> Known | None:
    """Rows that stand elsewhere already, or that primitives give."""
    if (same := _moved(draft, node, axis)) is not None:
        return same
    if (name := recognised(draft, node, axis)) is not None:
        return Known(name, axis)
    wanted = draft.rows_of(node, axis)
    return next((k for p in proposals(draft, node, axis) if (k := draft.tried(node, p, wanted))), None)


def _moved(draft: Draft, node: fx.Node, axis: int) -> Known | None:
    """For what only moves numbers about: the same rows, or a part of them that lies together."""
    if base_of(node) not in MOVES:
        return None
    source = node.all_input_nodes[0]
    if base_of(node) == "getitem" and source.all_input_nodes:  # of the parts of a split
        source = source.all_input_nodes[0]
    known = draft.form(source)
    if not isinstance(known, Known):
        return None
    rows, out = draft.rows_of(source, known.axis), draft.rows_of(node, axis)
    if rows.shape == out.shape and np.array_equal(rows, out):
        return replace(known, axis=axis)
    if out.shape[1] < rows.shape[1] and (name := draft.signal(source)):
        for start in np.flatnonzero((rows == out[:, :1]).all(axis=0)):
            if np.array_equal(rows[:, start : start + out.shape[1]], out):
                part = Slice(Size.of(int(start)), Size.of(int(start) + out.shape[1]))
                return Known(draft.add(node, part, (name,), "slice", out), axis)
    return None


def _unnamed(draft: Draft, node: fx.Node, axis: int) -> Known:
    """An opaque node, or one that mixes tokens: the program from known rows up to here."""
    inside, ends = region(draft, node)
    out = draft.exported.values[node]
    rows = np.asarray(rows_of(out, axis).double().numpy())
    signals = tuple(dict.fromkeys(name for e in ends if (name := draft.signal(e))))
    read = dict.fromkeys(p for n in inside for a in n.all_input_nodes for p in _parameters_of(draft, a))
    width = Size.of(rows.shape[1])
    op = unnamed(draft, inside, read, mixes(draft, node, axis, inside, ends), width)
    kind = "mix" if op.mixing else base_of(node)
    return Known(draft.add(node, op, (*signals, *read), kind, rows), axis)


def _parameters_of(draft: Draft, node: fx.Node) -> tuple[str, ...]:
    form = draft.form(node)
    return form.of if isinstance(form, Constant) else ()


def _tap(draft: Draft, node: fx.Node) -> list[Tap]:
    """A tap where parameters meet a signal in what the model's own code calls."""
    read = frozenset(p for a in node.all_input_nodes for p in _parameters_of(draft, a))
    form = draft.forms[node]
    if not read or isinstance(form, Constant):
        return []
    ends = [(a, draft.form(a)) for a in node.all_input_nodes]
    if not isinstance(form, Known) or form.shift or any(isinstance(f, Raw) for _, f in ends):
        return [Tap(read, (), NO_ROWS)]
    signals = tuple((f.name, draft.order(a, f.axis)) for a, f in ends if isinstance(f, Known) and not f.shift)
    by_row = form.axis == draft.exported.values[node].dim() - 2
    return [Tap(read, signals, (form.name, draft.order(node, form.axis)), by_row)]


def _fold(draft: Draft, taps: list[Tap]) -> None:
    """Takes what only leads into a mixing node, and has no parameters, into that node."""
    tapped = {t.output[0] for t in taps} | {s for t in taps for s, _ in t.signals}
    while True:
        readers: dict[str, set[str]] = {}
        for n in draft.nodes.values():
            for a in n.args:
                readers.setdefault(a, set()).add(n.name)
        for inner in draft.nodes.values():
            into = readers.get(inner.name, set())
            if len(into) == 1 and inner.name not in tapped and draft.nodes[next(iter(into))].op.mixing:
                break
        else:
            return
        outer = draft.nodes[next(iter(into))]
        args = dict.fromkeys(b for a in outer.args for b in (inner.args if a == inner.name else (a,)))
        draft.nodes[outer.name] = replace(outer, args=tuple(args))
        del draft.nodes[inner.name]


def _relevant(draft: Draft, output: str) -> tuple[Node, ...]:
    """The nodes that the output depends on."""
    seen, stack = {output}, [output]
    while stack:
        for a in draft.nodes[stack.pop()].args:
            if a in draft.nodes and a not in seen:
                seen.add(a)
                stack.append(a)
    return tuple(n for n in draft.nodes.values() if n.name in seen)


def _parameters(draft: Draft, kept: tuple[Node, ...]) -> tuple[Parameter, ...]:
    """The parameters that the graph reads; what others are made of may not move."""
    names = dict.fromkeys(a for n in kept for a in n.args if draft.is_parameter(a))
    used = [draft.stored[n].derived for n in names if n in draft.stored]
    held = {name for d in used if d is not None for name in d.reads.values() if name not in d.ones}
    found = []
    for name in names:
        stored = draft.stored.get(name)
        readers = [n.op for n in kept if name in n.args]
        if stored is None or (stored.derived is None and not any(isinstance(op, MatMul) for op in readers)):
            stored = Stored(_flat(draft.tensor(name), readers))
        draft.stored[name] = stored
        fixed = stored.derived is not None or name in held or not draft.tensor(name).is_floating_point()
        found.append(Parameter(name, tuple(Size.of(s) for s in stored.shape), frozen=fixed))
    return tuple(found)


def _flat(tensor: Tensor, readers: list[Op]) -> tuple[int, ...]:
    """The shape of a parameter that no product reads: a vector, or a matrix as it lies."""
    if tensor.dim() < 2 or any(isinstance(op, Add | Multiply) for op in readers):
        return (tensor.numel(),)
    return (int(np.prod(tensor.shape[:-1])), tensor.shape[-1])


__all__ = ["STREAM", "Stored", "Tap", "Translation", "translate"]
