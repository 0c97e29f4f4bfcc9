"""What an operation of the program may be, most likely first: a rule for each kind proposes primitives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from blockkit.graph.ops import (
    Activation,
    Add,
    Concat,
    LayerNorm,
    MatMul,
    Multiply,
    Op,
    RMSNorm,
    Scale,
    Slice,
    Softmax,
)
from blockkit.graph.ops.routing import Clamp, Repeat
from blockkit.graph.sizes import Size

from .draft import Draft, base_of, layouts
from .values import Constant, Known, Proposal, Stored

MOST_PARTS = 16  # heads that are told apart, copies that are put side by side
Rule = Callable[[Draft, fx.Node, int], Iterator[Proposal]]
Steps = list[tuple[Op, tuple[str, ...], str]]


def argument(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    """An argument by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    return node.args[0], argument(node, 1, "other")


def _widened(t: Draft, names: tuple[str, ...], node: fx.Node, axis: int) -> tuple[Steps, tuple[str, ...]]:
    """Rows of one number each repeated to the width of the node's, as broadcasting does."""
    width = t.rows_of(node, axis).shape[1]
    steps: Steps = []
    found = []
    for name in names:
        if t.rows[name].shape[1] == 1 and width > 1:
            steps.append((Repeat(Size.of(width)), (name,), "repeat"))
            name = f"#{len(steps) - 1}"
        found.append(name)
    return steps, tuple(found)


def _sum(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    a, b = _operands(node)
    times = float(node.kwargs.get("alpha", 1) or 1)
    if base_of(node) == "rsub":
        a, b = b, a
    sign = times if base_of(node) == "add" else -times
    left, right = t.shifted(a), t.shifted(b)
    if left and (c := t.number(b)) is not None:
        yield Proposal(base=left[0], shift=left[1] + sign * c)
    elif right and (c := t.number(a)) is not None:
        if sign == 1:
            yield Proposal(base=right[0], shift=right[1] + c)
        yield Proposal(((Scale(sign), (right[0],), "scale"),), shift=c + sign * right[1])
    elif left and right:
        steps, (first, second) = _widened(t, (t.signal(a) or "", t.signal(b) or ""), node, axis)
        if sign != 1:
            steps.append((Scale(sign), (second,), "scale"))
            second = f"#{len(steps) - 1}"
        yield Proposal((*steps, (Add(), (first, second), "add")))
    elif name := t.signal(a) or t.signal(b):
        yield from _with_vector(t, node, axis, name, b if left else a, 1.0 if left else sign, sign if left else 1.0)


def _with_vector(
    t: Draft, node: fx.Node, axis: int, name: str, other: Any, mine: float, its: float
) -> Iterator[Proposal]:
    """mine * rows + its * vector."""
    if its == 1 and (vector := t.vector(other, node, axis)):
        steps, (name,) = _widened(t, (name,), node, axis)
        if mine != 1:
            steps.append((Scale(mine), (name,), "scale"))
            name = f"#{len(steps) - 1}"
        yield Proposal((*steps, (Add(), (name, vector[0]), "add")), shift=vector[1])


def _product(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    a, b = _operands(node)
    if base_of(node) == "div":
        if (name := t.signal(a)) and (c := t.number(b)):
            yield Proposal(((Scale(1.0 / c), (name,), "scale"),))
        elif name and (below := t.signal(b)):
            yield _ratio(t, node, axis, name, below)
        return
    pairs = sorted(((a, b), (b, a)), key=lambda pair: bool((t.shifted(pair[0]) or ("", 0.0))[1]))
    for one, other in pairs:  # an offset goes with the second factor
        name = t.signal(one)
        if name is None:
            continue
        if (c := t.number(other)) is not None:
            yield Proposal(((Scale(c), (name,), "scale"),))
        elif moved := t.shifted(other):
            steps, (first, second) = _widened(t, (name, moved[0]), node, axis)
            yield Proposal((*steps, (Multiply(moved[1]), (first, second), "multiply")))
        elif vector := t.vector(other, node, axis):
            steps, (name,) = _widened(t, (name,), node, axis)
            yield Proposal((*steps, (Multiply(vector[1]), (name, vector[0]), "multiply")))


def _ratio(t: Draft, node: fx.Node, axis: int, above: str, below: str) -> Proposal:
    """Rows divided by rows: multiplied by their reciprocals, which no primitive gives."""
    known = t.reciprocal(node, below)
    steps, names = _widened(t, (above, known), node, axis)
    return Proposal((*steps, (Multiply(), names, "multiply")))


def _matrix(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    """A matrix of parameters times rows, however it is written; with a bias where there is one."""
    signals = [n for n in node.all_input_nodes if isinstance(t.form(n), Known)]
    stored = list(dict.fromkeys(p for n in node.all_input_nodes if (p := t.parameter_of(n))))
    if len(signals) != 1 or (z := t.signal(signals[0])) is None:
        return
    for weight in stored:
        for i, (shape, turned) in enumerate(layouts(tuple(t.tensor(weight).shape))):
            lies = Stored(shape[::-1] if turned else shape, turned)
            if lies.shape[1] != t.rows[z].shape[1]:
                continue
            step = (MatMul(), (z, f"{weight}\0{i}"), "matmul")
            biases = [p for p in stored if p != weight and t.tensor(p).numel() == lies.shape[0]]
            for bias in ("", *biases):
                added = ((Add(), ("#0", bias), "add"),) if bias else ()
                yield Proposal((step, *added), stored={weight: lies})
    yield from _scaled_matrix(t, node, axis, z)


def _scaled_matrix(t: Draft, node: fx.Node, axis: int, z: str) -> Iterator[Proposal]:
    """A matrix whose rows parameters scale (weight norm): the product without them, times them."""
    width = t.rows_of(node, axis).shape[1]
    biases = ["", *(p for n in node.all_input_nodes if (p := t.parameter_of(n)) and t.tensor(p).numel() == width)]
    for made in node.all_input_nodes:
        form = t.form(made)
        if not isinstance(form, Constant) or form.given or len(form.of) < 2:
            continue
        shape = tuple(t.exported.values[made].shape)
        if len(shape) != 2 or shape != (width, t.rows[z].shape[1]):
            continue
        for scales in (p for p in form.of if t.tensor(p).numel() == width):
            matrix = t.derived(made, None, frozenset([scales]))
            steps: Steps = [(MatMul(), (z, matrix), "matmul"), (Multiply(), ("#0", scales), "multiply")]
            for bias in biases:
                yield Proposal((*steps, *(((Add(), ("#1", bias), "add"),) if bias else ())))


def _norm(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    name = t.signal(node.args[0])
    if name is None:
        return
    plain: Op
    if "rms" in base_of(node):
        eps = argument(node, 3, "eps")
        own = torch.float64 if t.exported.dtype is torch.float64 else torch.float32  # in which 16 bits are normed, too
        plain, kind = RMSNorm(float(torch.finfo(own).eps if eps is None else eps)), "rms_norm"
    else:
        plain, kind = LayerNorm(float(argument(node, 4, "eps", 1e-5))), "layer_norm"
    steps = _over_parts(plain, name, kind, t.rows[name].shape[1], int(np.prod(argument(node, 1))))
    if weight := t.vector(argument(node, 2, "weight"), node, axis):
        steps.append((Multiply(weight[1]), (f"#{len(steps) - 1}", weight[0]), "multiply"))
    if kind == "layer_norm" and (bias := t.vector(argument(node, 3, "bias"), node, axis)):
        steps.append((Add(), (f"#{len(steps) - 1}", bias[0]), "add"))
    yield Proposal(tuple(steps))


def _over_parts(norm: Op, name: str, kind: str, width: int, each: int) -> Steps:
    """A norm of rows; where it is taken over equal parts of them (heads), of every part by itself."""
    if width == each or width % each or width // each > MOST_PARTS:
        return [(norm, (name,), kind)]
    steps: Steps = []
    for start in range(0, width, each):
        steps.append((Slice(Size.of(start), Size.of(start + each)), (name,), "slice"))
        steps.append((norm, (f"#{len(steps) - 1}",), kind))
    return [*steps, (Concat(), tuple(f"#{i}" for i in range(1, len(steps), 2)), "concat")]


def _activation(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    kind = base_of(node)
    if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        kind = "gelu_tanh"
    if name := t.signal(node.args[0]):
        yield Proposal(((Activation(kind), (name,), kind),))


def _clamp(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    kind = base_of(node)
    low = 0.0 if kind == "relu6" else None if kind == "clamp_max" else argument(node, 1, "min")
    high = 6.0 if kind == "relu6" else argument(node, 1 if kind == "clamp_max" else 2, "max")
    bounds = [t.number(b) if b is not None else None for b in (low, high)]
    if (name := t.signal(node.args[0])) and any(b is not None for b in bounds):
        yield Proposal(((Clamp(*bounds), (name,), "clamp"),))


def _negative(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    if name := t.signal(node.args[0]):
        yield Proposal(((Scale(-1.0), (name,), "scale"),))


def _power(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    name = t.signal(node.args[0])
    if name and (base_of(node) == "square" or argument(node, 1) == 2):
        yield Proposal(((Multiply(), (name, name), "square"),))


def _joined(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    parts: Any = node.args[0]
    names = [t.signal(p) for p in parts if t.exported.values[p].numel()]
    if names and all(names):
        yield Proposal(((Concat(), tuple(n for n in names if n), "concat"),))


def _softmax(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    if name := t.signal(node.args[0]):
        yield Proposal(((Softmax(), (name,), "softmax"),))


def _repeated(t: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    """Every coordinate several times over, or the whole vector."""
    name = t.signal(node.args[0])
    value = t.exported.values[node]
    if name is None or not isinstance(value, Tensor):
        return
    width, wide = t.rows[name].shape[1], t.rows_of(node, axis).shape[1]
    if wide <= width or wide % width:
        return
    yield Proposal(((Repeat(Size.of(wide // width)), (name,), "repeat"),))
    if wide // width <= MOST_PARTS:
        yield Proposal(((Concat(), (name,) * (wide // width), "concat"),))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("linear", "addmm", "mm", "matmul", "bmm", "einsum", "convolution", "conv1d", "baddbmm"), _matrix),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm", "layer_norm", "native_layer_norm"), _norm),
    **dict.fromkeys(("silu", "gelu", "relu", "tanh", "sigmoid", "leaky_relu"), _activation),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6"), _clamp),
    "neg": _negative,
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("cat", "concat"), _joined),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("expand", "repeat", "repeat_interleave"), _repeated),
}


def proposals(draft: Draft, node: fx.Node, axis: int) -> Iterator[Proposal]:
    """What the operation may be; nothing where no primitive is like it."""
    rule = RULES.get(base_of(node))
    return iter(()) if rule is None else rule(draft, node, axis)
