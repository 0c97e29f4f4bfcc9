"""A graph in the making: names, rows and nodes of what has been translated so far, and proposals held against them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.graph import Node
from blockkit.graph.ops import Add, Multiply, Op, Opaque
from blockkit.graph.packing import Packing
from blockkit.graph.sizes import Size

from ..calling.token_rows import TOKENS_FIRST, close, rows_of, token_axis
from .exported import Exported
from .values import STREAM, Constant, Derived, Form, Known, Proposal, Raw, Stored

PERMUTES = frozenset(["transpose", "permute", "movedim", "t", "mT", "swapaxes"])
FILLS = frozenset(["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like"])
TOLERANCE = 1e-4  # float32 sums of a few thousand terms


class Draft:
    """What is known of an exported block's values.

    Attributes:
        forms: of the program's nodes.
        nodes: of the graph, by name, in order.
        rows: the values of the graph's nodes, `[tokens, width]`.
        made_by: the program's node that first gave each of them.
        stored: how the parameters lie that the graph reads; those made of others among them.
    """

    def __init__(self, exported: Exported) -> None:
        self.exported, self.tokens = exported, exported.tokens
        self.parameters = {name: node for node, name in exported.parameters.items()}
        self.forms: dict[fx.Node, Form] = {n: Constant((p,)) for n, p in exported.parameters.items()}
        self.forms.update({n: Constant(given=True) for n in exported.given})
        self.forms.update({n: Raw() for n in exported.memory})
        axis = token_axis(exported.values[exported.stream], self.tokens)
        self.axis = 1 if axis is None else axis
        self.forms[exported.stream] = Known(STREAM, self.axis)
        self.tokens_first = {exported.stream} if self.axis == 0 else set()
        self.nodes: dict[str, Node] = {}
        self.rows: dict[str, np.ndarray] = {STREAM: self.rows_of(exported.stream, self.axis)}
        self.made_by: dict[str, fx.Node] = {STREAM: exported.stream}
        self.stored: dict[str, Stored] = {}
        for node in sorted(exported.own, key=lambda n: n.name):
            place = token_axis(exported.values[node], self.tokens)
            rows = self.rows_of(node, place or 0)
            self.forms[node] = Known(
                self.add(node, Opaque(Size.of(rows.shape[1])), (STREAM,), "given", rows), place or 0
            )

    # -- values ----------------------------------------------------------------------------------

    def form(self, node: Any) -> Form | None:
        """What is known of an argument; None for a literal."""
        return self.forms.get(node, Constant()) if isinstance(node, fx.Node) else None

    def rows_of(self, node: fx.Node, axis: int) -> np.ndarray:
        """The rows of a value of the program, `[tokens, width]` in float64."""
        return np.asarray(rows_of(self.exported.values[node].detach(), axis).double().numpy())

    def tensor(self, parameter: str) -> Tensor:
        """A parameter of the exported twin."""
        return self.exported.values[self.parameters[parameter]].detach()

    def value(self, name: str) -> np.ndarray:
        """The rows of a node, or a parameter as the graph has it: `NAME` as a vector, `NAME\\0i` in its i-th layout."""
        if name in self.rows:
            return self.rows[name]
        key, _, how = name.partition("\0")
        if (derived := self._derived(key)) is not None:
            values = self.exported.values
            found = derived.value(lambda n: values[self.exported.named[n]])
            return np.asarray(found.double().numpy())
        tensor = self.tensor(key).double().numpy()
        shape, transposed = layouts(tensor.shape)[int(how)] if how else ((tensor.size,), False)
        return np.asarray(tensor.reshape(shape).T if transposed else tensor.reshape(shape))

    def _derived(self, name: str) -> Derived | None:
        return self.stored[name].derived if name in self.stored else None

    def order(self, node: fx.Node, axis: int) -> int:
        """The token axis as a run with a batch needs it: `TOKENS_FIRST` where the tokens stand before the batch."""
        return TOKENS_FIRST if node in self.tokens_first else axis

    def follow(self, node: fx.Node, axis: int | None) -> None:
        """Notes whether the tokens stand before the batch in a value; the program's batch is one sequence."""
        if axis != 0:
            return
        value, read = self.exported.values[node], [a for a in node.all_input_nodes if a in self.forms]
        source = token_axis(self.exported.values[read[0]], self.tokens) if read else None
        if base_of(node) in PERMUTES and source:
            first = value.dim() > 2 and value.shape[1] == 1
        else:
            first = any(a in self.tokens_first for a in read)
        if first:
            self.tokens_first.add(node)

    # -- what an argument is -----------------------------------------------------------------------

    def signal(self, node: Any) -> str | None:
        """The graph's name of a value that is rows; a pending shift becomes a node."""
        form = self.form(node)
        if not isinstance(form, Known):
            return None
        if not form.shift:
            return form.name
        rows = self.rows[form.name]
        number = self._fixed(node, form.shift, rows.shape[1])
        name = self.add(node, Add(), (form.name, number), "shifted", rows + form.shift)
        self.forms[node] = Known(name, form.axis)
        return name

    def shifted(self, node: Any) -> tuple[str, float] | None:
        """The name of rows, and what is still to be added to them."""
        form = self.form(node)
        return (form.name, form.shift) if isinstance(form, Known) else None

    def number(self, value: Any) -> float | None:
        """A known number: a literal, or a tensor of it alone that no parameter and no argument is part of."""
        node = value if isinstance(value, fx.Node) else None
        if node is not None:
            form, value = self.form(node), self.exported.values[node]
            if form != Constant():
                return None
        if isinstance(value, Tensor):
            if not value.numel() or value.is_complex() or value.dtype is torch.bool or self._of_table(node):
                return None
            first = value.flatten()[0]
            return float(first) if bool((value == first).all()) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _before(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The operations that a known value is made by, in order; of what only lends its shape, none."""
        seen, stack = {node}, [node]
        while stack:
            last = stack.pop()
            for read in () if base_of(last) in FILLS else last.all_input_nodes:
                if read not in seen:
                    seen.add(read)
                    stack.append(read)
        return tuple(n for n in self.exported.nodes if n in seen)

    def _of_table(self, node: fx.Node | None) -> bool:
        """Whether a value is made of a buffer with several entries, which blocks of one kind may fill differently."""
        if node is None:
            return False
        leaves = {node} | {a for n in self._before(node) for a in n.all_input_nodes if base_of(n) not in FILLS}
        return any(n in leaves and self.exported.values[n].numel() > 1 for n in self.exported.named.values())

    def parameter_of(self, node: Any) -> str | None:
        """The one parameter that the node is made of."""
        form = self.form(node)
        return form.of[0] if isinstance(form, Constant) and len(form.of) == 1 and not form.given else None

    def vector(self, node: Any, out: fx.Node, axis: int) -> tuple[str, float] | None:
        """A known vector that the node adds to (or multiplies) every row of `out` by, and a number added to it first.

        A parameter itself where the vector is one, up to that number; else one that is made of parameters and buffers.
        """
        form = self.form(node)
        if not isinstance(form, Constant) or form.given or not isinstance(node, fx.Node):
            return None
        row = self._row(node, out, axis)
        if row is None:
            return None
        if (parameter := self.parameter_of(node)) is not None:
            own = self.tensor(parameter).flatten()
            if own.numel() == row.numel():
                shift = round((row.double() - own.double()).mean().item(), 5)
                if close(own.double() + shift, row.double(), 1e-6):
                    return parameter, shift
        return self.derived(node, spread=(tuple(self.exported.values[out].shape), axis)), 0.0

    def _row(self, node: fx.Node, out: fx.Node, axis: int) -> Tensor | None:
        """The vector that broadcasting makes of a value, if it is the same for all tokens."""
        value = self.exported.values[node]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        try:
            rows = rows_of(value.detach().broadcast_to(self.exported.values[out].shape), axis)
        except RuntimeError:
            return None
        return rows[0] if torch.equal(rows, rows[:1].expand_as(rows)) else None

    def derived(
        self, node: fx.Node, spread: tuple[tuple[int, ...], int] | None, ones: frozenset[str] = frozenset()
    ) -> str:
        """A parameter of the graph that may not move: what the program makes of the model's own tensors."""
        inside = self._before(node)
        named = {n: name for name, n in self.exported.named.items()}
        leaves = [(a, n) for n in (*inside, node) for a in (n, *n.all_input_nodes) if a not in inside]
        shapes = {a for a, n in leaves if base_of(n) in FILLS}  # of what is lent, the numbers do not matter
        leaves = [a for a, _ in leaves]
        reads = {a: named[a] for a in leaves if a in named and a not in shapes}
        fixed = {a: self.exported.values[a] for a in leaves if a not in reads}
        found = Derived(inside, reads, fixed, node, ones, spread)
        base = next(iter(reads.values())) if len(reads) == 1 else self._named(node, node.name)
        name = self._free(f"{base}.fixed" if base in self.parameters else base)
        shape = found.value(lambda n: self.exported.values[self.exported.named[n]]).shape
        self.stored[name] = Stored(tuple(shape), False, found)
        return name

    def _fixed(self, node: fx.Node, number: float, width: int) -> str:
        """A parameter of the graph that holds a known number, everywhere."""
        name = self._free(self._named(node, f"constant_{number:g}"))
        value = torch.full((width,), number)
        self.stored[name] = Stored((width,), False, Derived((), {}, {node: value}, node))
        return name

    # -- nodes -------------------------------------------------------------------------------------

    def tried(self, node: fx.Node, proposal: Proposal, wanted: np.ndarray) -> Known | None:
        """The proposal as nodes of the graph, if it gives the wanted rows."""
        values: dict[str, np.ndarray] = {}

        def value(name: str) -> np.ndarray:
            return values[name] if name in values else self.value(name)

        try:
            for i, (op, args, _) in enumerate(proposal.steps):
                if isinstance(op, Add | Multiply) and len({value(a).shape[-1] for a in args}) > 1:
                    return None
                values[f"#{i}"] = applied(op, [value(a) for a in args])
        except (ValueError, IndexError):
            return None
        last = f"#{len(proposal.steps) - 1}" if proposal.steps else proposal.base
        got = value(last) + proposal.shift
        if not same(got, wanted):
            return None
        self.stored.update(proposal.stored)
        names: dict[str, str] = {}
        for i, (op, args, suffix) in enumerate(proposal.steps):
            chosen = tuple(names.get(a, a) for a in args)
            names[f"#{i}"] = self.add(node, op, chosen, suffix, values[f"#{i}"])
        return Known(names.get(last, last), 0, proposal.shift)

    def add(self, node: fx.Node, op: Op, args: tuple[str, ...], kind: str, rows: np.ndarray) -> str:
        """A node of the graph, named by the module in which the program's node stands and what it does."""
        name = self._free(self._named(node, kind))
        self.nodes[name] = Node(name, op, tuple(a.partition("\0")[0] for a in args))
        self.rows[name] = rows
        self.made_by.setdefault(name, node)
        return name

    def reciprocal(self, node: fx.Node, name: str) -> str:
        """One divided by rows: an opaque node."""
        rows = 1 / self.rows[name]
        return self.add(node, Opaque(Size.of(rows.shape[1])), (name,), "reciprocal", rows)

    def taken(self, name: str) -> bool:
        """Whether something has the name."""
        return name in self.nodes or name in self.stored or name == STREAM or name in self.parameters

    def _free(self, base: str) -> str:
        """The name, or the first free one like it."""
        name, number = base, 1
        while self.taken(name):
            number += 1
            name = f"{base}_{number}"
        return name

    def is_parameter(self, name: str) -> bool:
        """Whether the graph reads it as a parameter."""
        return name in self.parameters or (name in self.stored and self.stored[name].derived is not None)

    @staticmethod
    def _named(node: fx.Node, kind: str) -> str:
        path = path_of(node)
        return f"{path}.{kind}" if path else kind

    def sources(self, node: fx.Node, most: int) -> Iterator[str]:
        """The rows from which operations without the model's parameters made what the node reads, the nearest first."""
        stack = [f.name for n in node.all_input_nodes if isinstance(f := self.form(n), Known)]
        seen = set(stack)
        while stack and len(seen) < most:
            name = stack.pop(0)
            yield name
            made = self.nodes.get(name)
            if made is None or made.op.mixing or any(a in self.parameters for a in made.args):
                continue
            fresh = [a for a in made.args if a not in seen and a in self.rows]
            stack.extend(fresh)
            seen.update(fresh)


def applied(op: Op, args: list[np.ndarray]) -> np.ndarray:
    """What a primitive gives for rows and parameters."""
    tokens = len(args[0])
    with np.errstate(all="ignore"):
        return np.asarray(op.forward(NumpyArrays(), args, Packing(None, (tokens,))))


def same(found: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    """Whether rows are equal up to float32 rounding."""
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


def layouts(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], bool]]:
    """Ways to read a tensor as a matrix y = W z: as `[d_out, d_in]`, or as `[d_in, d_out]` and turned round."""
    return [
        ((int(np.prod(shape[:k])), int(np.prod(shape[k:]))), turned)
        for k in range(1, len(shape))
        for turned in (False, True)
    ]


def base_of(node: fx.Node) -> str:
    """The operation's name, without its overload."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(target, "__name__", str(target))


def path_of(node: fx.Node) -> str:
    """The module of the user's in which the operation stands, within the block."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
