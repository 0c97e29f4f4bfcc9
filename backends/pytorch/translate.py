"""From an exported block to a graph of primitive operations, each held against numbers.

Every value of the program is followed as rows, one vector a token. An operation becomes a primitive only if that
primitive gives the very rows that the program gave for random numbers; so orientation, order of features and epsilons
are facts, not guesses. What no primitive describes becomes an `Opaque` node if a token's row depends on that token
alone, and a `Mix` node if it does not, which is tried on perturbed rows. A value that is no rows at all (attention
scores, tokens sorted by expert) stays inside the next node that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from blockkit.arrays import NumpyArrays
from blockkit.graph import Graph, Node, Parameter
from blockkit.layout import Layout
from blockkit.ops import (
    Activation,
    Add,
    Concat,
    LayerNorm,
    MatMul,
    Mix,
    Multiply,
    Op,
    Opaque,
    RMSNorm,
    Scale,
    Slice,
    Softmax,
)
from blockkit.sizes import Size

from .exported import Exported
from .rows import close, rows_of, token_axis

STREAM = "stream"
FUNCTIONS = {"silu": "silu", "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "leaky_relu": "leaky_relu"}
WRITTEN_OUT = ("gelu_tanh", "gelu", "quick_gelu", "silu")
TOLERANCE = 1e-4  # float32 sums of a few thousand terms
MOVES = frozenset(
    "view reshape _unsafe_view transpose permute unsqueeze squeeze expand contiguous clone to _to_copy type_as alias "
    "detach slice select narrow getitem flatten unflatten dropout movedim t numpy_T lift_fresh_copy".split()
)  # operations that put numbers elsewhere, if they do anything at all
MOST_SOURCES = 16  # values looked back to for what a norm or an activation written out was made of
NEAR = 8  # operations looked back over for the epsilon of a norm


@dataclass(frozen=True)
class Tap:
    """Where the program reads parameters: what a run of the model itself can show.

    Attributes:
        parameters: those that one call reads, by name in the block.
        signals: the graph's names of the other values that it reads, each with its token axis.
        output: the graph's name of what it gives, with its token axis.
    """

    parameters: frozenset[str]
    signals: tuple[tuple[str, int], ...]
    output: tuple[str, int]


@dataclass(frozen=True)
class Stored:
    """How a parameter of the graph lies in its tensor: a matrix as `[d_in, d_out]` if `transposed`."""

    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Translation:
    graph: Graph
    taps: tuple[Tap, ...]
    stored: Mapping[str, Stored]


@dataclass(frozen=True)
class Known:
    """A value that is rows: the graph's name for it, its token axis, and a number added that has no node yet."""

    name: str
    axis: int
    shift: float = 0.0


@dataclass(frozen=True)
class Constant:
    """A value that depends on parameters and known numbers alone; `of` are the parameters."""

    of: tuple[str, ...] = ()


class Raw:
    """A value that depends on the stream and is no rows."""


Form = Known | Constant | Raw


def translate(exported: Exported) -> Translation:
    """The graph of the block, its taps, and how its parameters lie in their tensors."""
    return _Translator(exported).translated()


class _Translator:
    def __init__(self, exported: Exported) -> None:
        self.exported, self.tokens = exported, exported.tokens
        self.forms: dict[fx.Node, Form] = {n: Constant((p,)) for n, p in exported.parameters.items()}
        axis = token_axis(exported.values[exported.stream], self.tokens)
        self.axis = 1 if axis is None else axis
        self.forms[exported.stream] = Known(STREAM, self.axis)
        self.forms.update({m: Raw() for m in exported.memory})
        self.rows: dict[str, np.ndarray] = {STREAM: self._rows(exported.stream, self.axis)}
        self.node_of: dict[str, fx.Node] = {STREAM: exported.stream}
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, Stored] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.taps: list[Tap] = []
        self.within: dict[str, tuple[fx.Node, ...]] = {}  # of opaque nodes: what of the program they stand for

    # -- the walk --------------------------------------------------------------------------------

    def translated(self) -> Translation:
        for node in self.exported.nodes:
            self.forms[node] = self._form(node)
        output = self._materialised(self.exported.output)
        if output == STREAM or output is None:
            output = self._add_node(self.exported.output, Scale(1.0), (STREAM,), "identity")
        self._fold()
        kept = self._relevant(output)
        parameters = self._parameters(kept)
        graph = Graph.build(STREAM, output, Size.of(self.rows[STREAM].shape[1]), parameters, kept)
        names = {n.name for n in kept} | {STREAM}
        taps = tuple(t for t in self.taps if t.output[0] in names and all(s in names for s, _ in t.signals))
        return Translation(graph, taps, {p.name: self.stored[p.name] for p in parameters})

    def _form(self, node: fx.Node) -> Form:
        inputs = [self.forms.get(n, Constant()) for n in node.all_input_nodes]
        value = self.exported.values[node]
        if all(isinstance(f, Constant) for f in inputs):
            return Constant(tuple(dict.fromkeys(p for f in inputs if isinstance(f, Constant) for p in f.of)))
        axis = token_axis(value, self.tokens)
        if axis is None:
            return Raw()
        if _base(node) in MOVES and value.is_floating_point() and (same := self._same(node, axis)):
            return same
        if not any(isinstance(f, Raw) for f in inputs) and value.is_floating_point():
            if (name := self._recognised(node, axis)) is not None:
                return Known(name, axis)
            if (found := self._primitive(node, axis)) is not None:
                self._tap(node, found, axis)
                return found
        found = self._unnamed(node, axis)
        self._tap(node, found, axis)
        return found

    def _rows(self, node: fx.Node, axis: int) -> np.ndarray:
        return np.asarray(rows_of(self.exported.values[node].detach(), axis).double().numpy())

    def _same(self, node: fx.Node, axis: int) -> Known | None:
        """For what only moves numbers about: the same rows, or a part of them that lies together."""
        source = node.all_input_nodes[0]
        if _base(node) == "getitem" and source.all_input_nodes:  # of the parts of a split
            source = source.all_input_nodes[0]
        known = self.forms.get(source)
        if not isinstance(known, Known):
            return None
        rows, out = self._rows(source, known.axis), self._rows(node, axis)
        if rows.shape == out.shape and np.array_equal(rows, out):
            return replace(known, axis=axis)
        if out.shape[1] < rows.shape[1] and (name := self.signal(source)):
            for start in np.flatnonzero((rows == out[:, :1]).all(axis=0)):
                if np.array_equal(rows[:, start : start + out.shape[1]], out):
                    part = Slice(Size.of(int(start)), Size.of(int(start) + out.shape[1]))
                    return Known(self._add_node(node, part, (name,), "slice", out), axis)
        return None

    # -- primitives ------------------------------------------------------------------------------

    def _primitive(self, node: fx.Node, axis: int) -> Known | None:
        """The primitive, or primitives, that give this value's rows; None if there are none."""
        rule = RULES.get(_base(node))
        if rule is None:
            return None
        wanted = self._rows(node, axis)
        for proposal in rule(self, node):
            found = self._tried(node, proposal, wanted)
            if found is not None:
                return replace(found, axis=axis)
        return None

    def _tried(self, node: fx.Node, proposal: Proposal, wanted: np.ndarray) -> Known | None:
        """The proposal as nodes of the graph, if it gives the wanted rows."""
        values: dict[str, np.ndarray] = {}

        def value(name: str) -> np.ndarray:
            return values[name] if name in values else self._value(name)

        try:
            for i, (op, args, _) in enumerate(proposal.steps):
                if isinstance(op, Add | Multiply) and len({value(a).shape[-1] for a in args}) > 1:
                    return None
                values[f"#{i}"] = op.forward(NumpyArrays(), [value(a) for a in args], Layout(None, (self.tokens,)))
        except (ValueError, IndexError):
            return None
        last = f"#{len(proposal.steps) - 1}" if proposal.steps else proposal.base
        got = value(last) + proposal.shift
        if got.shape != wanted.shape or not np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max():
            return None
        for name, stored in proposal.stored.items():
            self.stored[name] = stored
        names: dict[str, str] = {}
        for i, (op, args, suffix) in enumerate(proposal.steps):
            chosen = tuple(names.get(a, a) for a in args)
            names[f"#{i}"] = self._add_node(node, op, chosen, suffix, values[f"#{i}"])
        return Known(names.get(last, last), 0, proposal.shift)

    def _value(self, name: str) -> np.ndarray:
        """The rows of a node, or a parameter as the graph has it."""
        if name in self.rows:
            return self.rows[name]
        if name in self.constants:
            return self.constants[name]
        key, _, how = name.partition("\0")
        tensor = self._tensor(key).double().numpy()
        shape, transposed = _layouts(tensor.shape)[int(how)] if how else ((tensor.size,), False)
        return np.asarray(tensor.reshape(shape).T if transposed else tensor.reshape(shape))

    def _tensor(self, parameter: str) -> Tensor:
        node = next(n for n, p in self.exported.parameters.items() if p == parameter)
        return self.exported.values[node].detach()  # type: ignore[no-any-return]

    def signal(self, node: Any) -> str | None:
        """The graph's name of a value that is rows, without a pending shift."""
        if not isinstance(node, fx.Node) or not isinstance(self.forms.get(node), Known):
            return None
        return self._materialised(node)

    def shifted(self, node: Any) -> tuple[str, float] | None:
        """The name of rows, and what is still to be added to them."""
        form = self.forms.get(node) if isinstance(node, fx.Node) else None
        return (form.name, form.shift) if isinstance(form, Known) else None

    def _materialised(self, node: fx.Node) -> str | None:
        """The name of the node's rows; a pending shift becomes an opaque node."""
        form = self.forms[node]
        if not isinstance(form, Known):
            return None
        if not form.shift:
            return form.name
        rows = self.rows[form.name] + form.shift
        name = self._add_node(node, Opaque(Size.of(rows.shape[1])), (form.name,), "shifted", rows)
        self.within[name] = (node,)
        self.forms[node] = Known(name, form.axis)
        return name

    def vector(self, node: Any, width: int) -> tuple[str, float] | None:
        """A parameter that the node is, as a vector of that width, up to a number that is added."""
        form = self.forms.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(form, Constant) or len(form.of) != 1:
            return None
        own, value = self._tensor(form.of[0]).double().flatten(), self.exported.values[node]
        if own.numel() != width or not isinstance(value, Tensor) or value.numel() != width:
            return None
        shift = (value.double().flatten() - own).mean().item()
        shift = round(shift, 5)
        if not close(own + shift, value.double().flatten(), 1e-6):
            return None
        return form.of[0], shift

    def parameter_of(self, node: Any) -> str | None:
        """The one parameter that the node is made of."""
        form = self.forms.get(node) if isinstance(node, fx.Node) else None
        return form.of[0] if isinstance(form, Constant) and len(form.of) == 1 else None

    def known_vector(self, node: Any, width: int) -> str | None:
        """Known numbers (a buffer, a table) as a vector that is the same for all tokens: a frozen parameter."""
        value = self.exported.values.get(node) if isinstance(node, fx.Node) else None
        form = self.forms.get(node, Constant()) if isinstance(node, fx.Node) else None
        if not isinstance(form, Constant) or form.of or not isinstance(value, Tensor) or value.numel() != width:
            return None
        if not value.is_floating_point() or value.numel() == 1:
            return None
        name = f"{_path(node)}.{node.name}".lstrip(".")
        self.constants[name] = np.asarray(value.detach().double().numpy().reshape(-1))
        return name

    def number(self, value: Any) -> float | None:
        """A known number: a literal, or a tensor of one element that no parameter is part of."""
        if isinstance(value, fx.Node):
            form, value = self.forms.get(value, Constant()), self.exported.values[value]
            if not isinstance(form, Constant) or form.of:
                return None
        if isinstance(value, Tensor):
            return float(value) if value.numel() == 1 else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    # -- what no primitive describes ---------------------------------------------------------------

    def _unnamed(self, node: fx.Node, axis: int) -> Known:
        """An opaque node, or one that mixes tokens: the program from known rows up to here."""
        region, ends = self._region(node)
        out = self.exported.values[node]
        rows = self._rows(node, axis) if out.is_floating_point() else rows_of(out, axis).double().numpy()
        signals = tuple(dict.fromkeys(self.forms[e].name for e in ends))  # type: ignore[union-attr]
        read = dict.fromkeys(p for n in region for a in n.all_input_nodes for p in self._parameters_of(a))
        mixes = any(a in self.exported.memory for n in region for a in n.all_input_nodes)
        mixes = mixes or self._looks_across(node, axis, region, ends)
        width = Size.of(rows.shape[1])
        op: Op = Mix(width) if mixes else Opaque(width)
        name = self._add_node(node, op, (*signals, *read), "mix" if mixes else _base(node), rows)
        self.within[name] = region
        return Known(name, axis)

    def _parameters_of(self, node: fx.Node) -> tuple[str, ...]:
        form = self.forms.get(node)
        return form.of if isinstance(form, Constant) else ()

    def _region(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """The program's nodes between known rows and this one, in order, and the rows that they read."""
        inside, ends, stack = {node}, {}, [node]
        while stack:
            for read in stack.pop().all_input_nodes:
                form = self.forms.get(read)
                if isinstance(form, Known):
                    self._materialised(read)
                    ends[read] = None
                elif isinstance(form, Raw) and read not in inside and read not in self.exported.memory:
                    inside.add(read)
                    stack.append(read)
        return tuple(n for n in self.exported.nodes if n in inside), tuple(ends)

    def _looks_across(
        self, node: fx.Node, axis: int, region: tuple[fx.Node, ...], ends: tuple[fx.Node, ...]
    ) -> bool:
        """Whether a row changes when other rows of what is read do."""
        plain = rows_of(self.exported.values[node], axis).double()
        for row in (0, self.tokens // 2):
            moved = {end: self._perturbed(end, row) for end in ends}
            try:
                again = self.exported.replay(region, moved)[node]
            except Exception:
                return True  # it cannot even be run with other values: nothing is known of it
            rest = [i for i in range(self.tokens) if i != row]
            other = rows_of(again, axis).double()
            if other.shape != plain.shape or not close(other[rest], plain[rest], 1e-5):
                return True
        return False

    def _perturbed(self, end: fx.Node, row: int) -> Tensor:
        form, value = self.forms[end], self.exported.values[end]
        axis = form.axis if isinstance(form, Known) else 0
        moved = value.clone()
        part = moved.select(axis, row)
        if value.is_floating_point():
            generator = torch.Generator().manual_seed(row + 1)
            part.add_(torch.randn(part.shape, generator=generator) * (value.abs().mean() + 1e-3))
        else:
            part.copy_(value.select(axis, (row + 1) % self.tokens))
        return moved  # type: ignore[no-any-return]

    def _recognised(self, node: fx.Node, axis: int) -> str | None:
        """A norm or an activation written out in smaller operations, of which this is the last."""
        if _base(node) not in ("mul", "div") or len(node.all_input_nodes) != 2:
            return None
        wanted = self._rows(node, axis)
        for name in self._sources(node):
            h = self.rows[name]
            if h.shape != wanted.shape:
                continue
            for op in self._candidates(node):
                with np.errstate(all="ignore"):
                    got = op.forward(NumpyArrays(), [h], Layout(None, (self.tokens,)))
                if np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max() and self._holds(node, name, op, axis):
                    return self._add_node(node, op, (name,), getattr(op, "fn", op.kind), wanted)
        return None

    def _sources(self, node: fx.Node) -> Iterator[str]:
        """The rows from which operations without parameters made what the node reads, the nearest first."""
        stack = [f.name for n in node.all_input_nodes if isinstance(f := self.forms.get(n), Known)]
        seen = set(stack)
        while stack and len(seen) < MOST_SOURCES:
            name = stack.pop(0)
            yield name
            made = self.nodes.get(name)
            if made is None or made.op.mixing or any(self._is_parameter(a) for a in made.args):
                continue
            fresh = [a for a in made.args if a not in seen]
            stack.extend(fresh)
            seen.update(fresh)

    def _candidates(self, node: fx.Node) -> Iterator[Op]:
        """Activations; and norms with the epsilons that stand in the program near the node."""
        for fn in WRITTEN_OUT:
            yield Activation(fn)
        near, stack = [node], [node]
        for _ in range(NEAR):
            stack = list(dict.fromkeys(a for n in stack for a in n.all_input_nodes if a.op == "call_function"))
            near.extend(stack)
        literals = {float(a) for n in near for a in (*n.args, *n.kwargs.values()) if isinstance(a, float) and 0 < a < 0.1}
        for eps in (*sorted(literals, reverse=True), 0.0):
            yield RMSNorm(eps)
            yield LayerNorm(eps)

    def _holds(self, node: fx.Node, name: str, op: Op, axis: int) -> bool:
        """Whether the norm is right for small numbers as well, where its epsilon shows."""
        source = self.node_of[name]
        form = self.forms[source]
        if not isinstance(form, Known):
            return False
        if isinstance(op, Activation):
            return True
        eps = getattr(op, "eps", 0.0)
        small = self.exported.values[source] * max(eps, 1e-8) ** 0.5
        region = self._between(source, node)
        got = rows_of(self.exported.replay(region, {source: small})[node], axis).double().numpy()
        h = rows_of(small, form.axis).double().numpy()
        wanted = op.forward(NumpyArrays(), [h], Layout(None, (self.tokens,)))
        return bool(np.abs(got - wanted).max() <= 1e-3 * np.abs(wanted).max())

    def _between(self, source: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
        """The program's nodes that depend on the source and lead to the node, in order."""
        after = {source}
        for n in self.exported.nodes:
            if any(a in after for a in n.all_input_nodes):
                after.add(n)
        before, stack = {node}, [node]
        while stack:
            for a in stack.pop().all_input_nodes:
                if a in after and a not in before and a is not source:
                    before.add(a)
                    stack.append(a)
        return tuple(n for n in self.exported.nodes if n in before)

    # -- the graph -------------------------------------------------------------------------------

    def _add_node(
        self, node: fx.Node, op: Op, args: tuple[str, ...], kind: str, rows: np.ndarray | None = None
    ) -> str:
        clean = tuple(a.partition("\0")[0] for a in args)
        path = _path(node)
        base = name = f"{path}.{kind}" if path else kind
        number = 1
        while name in self.nodes or name in self.stored or name == STREAM or self._is_parameter(name):
            number += 1
            name = f"{base}_{number}"
        self.nodes[name] = Node(name, op, clean)
        self.rows[name] = rows if rows is not None else self.rows[clean[0]]
        self.node_of.setdefault(name, node)
        return name

    def _is_parameter(self, name: str) -> bool:
        return name in self.exported.parameters.values() or name in self.constants

    def _tap(self, node: fx.Node, found: Known, axis: int) -> None:
        """Notes where parameters are read by what the model's own code calls."""
        read = frozenset(p for a in node.all_input_nodes for p in self._parameters_of(a))
        name = self._plain_name(found)
        if not read or name is None:
            return
        ends = [(a, self.forms[a]) for a in node.all_input_nodes]
        signals = tuple((f.name, f.axis) for _, f in ends if isinstance(f, Known) and not f.shift)
        if any(isinstance(f, Raw) for _, f in ends):
            return
        self.taps.append(Tap(read, signals, (name, axis)))

    @staticmethod
    def _plain_name(found: Known) -> str | None:
        return None if found.shift else found.name

    def _fold(self) -> None:
        """Takes what only leads into a mixing node, and has no parameters, into that node."""
        while True:
            readers: dict[str, set[str]] = {}
            for n in self.nodes.values():
                for a in n.args:
                    readers.setdefault(a, set()).add(n.name)
            tapped = {t.output[0] for t in self.taps} | {s for t in self.taps for s, _ in t.signals}
            folded = None
            for n in self.nodes.values():
                into = readers.get(n.name, set())
                if len(into) == 1 and n.name not in tapped and self.nodes[next(iter(into))].op.mixing:
                    folded = n, self.nodes[next(iter(into))]
                    break
            if folded is None:
                return
            inner, outer = folded
            args = dict.fromkeys(b for a in outer.args for b in (inner.args if a == inner.name else (a,)))
            self.nodes[outer.name] = replace(outer, args=tuple(args))
            del self.nodes[inner.name]

    def _relevant(self, output: str) -> tuple[Node, ...]:
        seen, stack = {output}, [output]
        while stack:
            for a in self.nodes[stack.pop()].args:
                if a in self.nodes and a not in seen:
                    seen.add(a)
                    stack.append(a)
        return tuple(n for n in self.nodes.values() if n.name in seen)

    def _parameters(self, kept: tuple[Node, ...]) -> tuple[Parameter, ...]:
        names = dict.fromkeys(a for n in kept for a in n.args if self._is_parameter(a))
        found = []
        for name in names:
            if name in self.constants:
                found.append(Parameter(name, (Size.of(self.constants[name].size),), frozen=True))
                self.stored[name] = Stored((self.constants[name].size,))
                continue
            shape = tuple(self._tensor(name).shape)
            as_matrix = any(isinstance(n.op, MatMul) and n.args[1] == name for n in kept)
            stored = self.stored.get(name)
            if stored is None or not as_matrix:
                flat = shape if len(shape) < 3 else (int(np.prod(shape[:-1])), shape[-1])
                vector = any(isinstance(n.op, Add | Multiply) and name in n.args for n in kept)
                flat = (int(np.prod(shape)),) if vector or not flat else flat
                stored = Stored(flat)
            self.stored[name] = stored
            found.append(Parameter(name, tuple(Size.of(s) for s in stored.shape)))
        return tuple(found)


def _layouts(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], bool]]:
    """Ways to read a tensor as a matrix y = W z: as `[d_out, d_in]`, or as `[d_in, d_out]` and turned round."""
    return [
        ((int(np.prod(shape[:k])), int(np.prod(shape[k:]))), turned)
        for k in range(1, len(shape))
        for turned in (False, True)
    ]


def _base(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(target, "__name__", str(target))


def _path(node: fx.Node) -> str:
    """The module of the user's in which the operation stands, within the block."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


# -- rules: what an operation of the program may be, most likely first -----------------------------


@dataclass(frozen=True)
class Proposal:
    """Primitives in order; `#i` stands for the result of the i-th. Without any: rows `base` plus a number `shift`."""

    steps: tuple[tuple[Op, tuple[str, ...], str], ...] = ()
    base: str = ""
    shift: float = 0.0
    stored: Mapping[str, Stored] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.stored is None:
            object.__setattr__(self, "stored", {})


Rule = Callable[[_Translator, fx.Node], Iterator[Proposal]]


def _argument(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _sum(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    kind, a, b = _base(node), node.args[0], _argument(node, 1, "other")
    times = float(node.kwargs.get("alpha", 1) or 1)
    if kind == "rsub":
        a, b, kind = b, a, "sub"
    sign = -times if kind == "sub" else times
    left, right = t.shifted(a), t.shifted(b)
    if left and (c := t.number(b)) is not None:
        yield Proposal(base=left[0], shift=left[1] + sign * c)
    if right and (c := t.number(a)) is not None:
        if sign == 1:
            yield Proposal(base=right[0], shift=right[1] + c)
        return
    first, second = t.signal(a), t.signal(b)
    if first and second:
        if sign == 1:
            yield Proposal(((Add(), (first, second), "add"),))
        else:
            yield Proposal(((Scale(sign), (second,), "scale"), (Add(), (first, "#0"), "add")))
        return
    name, other = (first, b) if first else (second, a)
    if name is None:
        return
    vector = t.vector(other, t.rows[name].shape[1])
    if vector and not vector[1] and sign == 1:
        yield Proposal(((Add(), (name, vector[0]), "add"),))
    if sign == 1 and (fixed := t.known_vector(other, t.rows[name].shape[1])):
        yield Proposal(((Add(), (name, fixed), "add"),))


def _product(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    a, b = node.args[0], _argument(node, 1, "other")
    if _base(node) == "div":
        c, name = t.number(b), t.signal(a)
        if name and c:
            yield Proposal(((Scale(1.0 / c), (name,), "scale"),))
        return
    for one, other in ((a, b), (b, a)):
        name = t.signal(one)
        if name is None:
            continue
        if (c := t.number(other)) is not None:
            yield Proposal(((Scale(c), (name,), "scale"),))
        if vector := t.vector(other, t.rows[name].shape[1]):
            yield Proposal(((Multiply(vector[1]), (name, vector[0]), "multiply"),))
        if moved := t.shifted(other):
            yield Proposal(((Multiply(moved[1]), (name, moved[0]), "multiply"),))
        if fixed := t.known_vector(other, t.rows[name].shape[1]):
            yield Proposal(((Multiply(), (name, fixed), "multiply"),))


def _matrix(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    """A matrix of parameters times rows, however it is written; with a bias where there is one."""
    signals = [n for n in node.all_input_nodes if isinstance(t.forms.get(n), Known)]
    stored = list(dict.fromkeys(p for n in node.all_input_nodes if (p := t.parameter_of(n))))
    if len(signals) != 1 or not stored or (z := t.signal(signals[0])) is None:
        return
    for weight in stored:
        tensor = t._tensor(weight)
        biases = [p for p in stored if p != weight]
        for i, (shape, turned) in enumerate(_layouts(tuple(tensor.shape))):
            rows, columns = (shape[1], shape[0]) if turned else shape
            if columns != t.rows[z].shape[1]:
                continue
            lies = {weight: Stored((rows, columns), turned)}
            step = (MatMul(), (z, f"{weight}\0{i}"), "matmul")
            yield Proposal((step,), stored=lies)
            for bias in biases:
                if t._tensor(bias).numel() == rows:
                    yield Proposal((step, (Add(), ("#0", bias), "add")), stored=lies)


def _norm_rule(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    name = t.signal(node.args[0])
    if name is None:
        return
    width = t.rows[name].shape[1]
    plain: Op
    if "rms" in _base(node):
        eps = _argument(node, 3, "eps")
        plain = RMSNorm(float(torch.finfo(torch.float32).eps if eps is None else eps))
        kind = "rms_norm"
    else:
        plain, kind = LayerNorm(float(_argument(node, 4, "eps", 1e-5))), "layer_norm"
    steps: list[tuple[Op, tuple[str, ...], str]] = [(plain, (name,), kind)]
    weight, bias = t.vector(_argument(node, 2, "weight"), width), t.vector(_argument(node, 3, "bias"), width)
    if weight:
        steps.append((Multiply(weight[1]), ("#0", weight[0]), "multiply"))
    if bias and kind == "layer_norm":
        steps.append((Add(), (f"#{len(steps) - 1}", bias[0]), "add"))
    yield Proposal(tuple(steps))


def _activation(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    name = t.signal(node.args[0])
    if name is None:
        return
    kind = _base(node)
    if kind == "gelu":
        kind = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    yield Proposal(((Activation(FUNCTIONS.get(kind, kind)), (name,), kind),))


def _negative(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    if name := t.signal(node.args[0]):
        yield Proposal(((Scale(-1.0), (name,), "scale"),))


def _power(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    name = t.signal(node.args[0])
    if name and (_base(node) == "square" or _argument(node, 1) == 2):
        yield Proposal(((Multiply(), (name, name), "square"),))


def _joined(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    parts: Any = node.args[0]
    names = [t.signal(p) for p in parts]
    if all(names):
        yield Proposal(((Concat(), tuple(n for n in names if n), "concat"),))


def _softmax(t: _Translator, node: fx.Node) -> Iterator[Proposal]:
    if name := t.signal(node.args[0]):
        yield Proposal(((Softmax(), (name,), "softmax"),))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("linear", "addmm", "mm", "matmul", "bmm", "einsum", "convolution", "conv1d", "baddbmm"), _matrix),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm", "layer_norm", "native_layer_norm"), _norm_rule),
    **dict.fromkeys(("silu", "gelu", "relu", "tanh", "sigmoid", "leaky_relu"), _activation),
    "neg": _negative,
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("cat", "concat"), _joined),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
}
