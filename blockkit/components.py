"""The parts of which people build blocks, and how each lowers to primitive operations.

    x = stream()
    v = x + RMSNorm(Attention(RMSNorm(x), heads=4, kv_heads=1, head_dim=256))
    y = v + RMSNorm(GatedMLP(RMSNorm(v), hidden=2048, activation="gelu_tanh"))
    block = Block(y, width=640)

A component is a frozen dataclass: its first field is its input, the others are its settings. Sizes
are numbers or symbols (`hidden="d_ff"`). Parameters are named after the component that owns them:
`mlp.down_proj`. A new component is a subclass with a `lower` method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .attention import Attend, Rope
from .errors import BadInput
from .graph import Graph, Node, Parameter
from .ops import Activation as ActivationOp
from .ops import Add as AddOp
from .ops import LayerNorm as LayerNormOp
from .ops import MatMul, Mix, Multiply, Op, Slice
from .ops import RMSNorm as RMSNormOp
from .ops import Scale as ScaleOp
from .ops import Softcap as SoftcapOp
from .sizes import Size

Number = int | float | str  # a number, or the name of a constant of the architecture
if TYPE_CHECKING:
    Signal = Any  # a Component while a block is being written, a node's name in a Block
else:
    Signal = str


@dataclass
class Lowering:
    """A graph in the making: collects nodes and parameters, with the constants that are known."""

    constants: Mapping[str, Any]
    width: Size
    shapes: dict[str, Size]
    nodes: list[Node] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)

    def size(self, value: int | str) -> Size:
        return Size.of(value).bind(self.constants)

    def number(self, value: Number, what: str) -> float:
        found = self.constants.get(value) if isinstance(value, str) else value
        if found is None:
            return 1.0  # a symbol without a number: fine for judging; running asks for all constants
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise BadInput(f"{what}: {value!r} stands for {found!r}, which is not a number")
        return float(found)

    def add(self, name: str, op: Op, *args: str) -> str:
        self.nodes.append(Node(name, op, args))
        return name

    def store(self, name: str, *shape: Size) -> str:
        self.parameters.append(Parameter(name, shape))
        return name

    def linear(self, owner: str, slot: str, z: str, d_in: Size, d_out: Size, bias: bool) -> str:
        """`owner.slot` applied to z; nodes are named after the parameter they use."""
        weight = self.store(f"{owner}.{slot}", d_out, d_in)
        last = self.add(f"{owner}.{slot}.out", MatMul(), z, weight)
        if not bias:
            return last
        return self.add(f"{owner}.{slot}.biased", AddOp(), last, self.store(f"{weight}_bias", d_out))


class Component:
    """Base of the components; `kind` is the name in YAML."""

    kind: ClassVar[str] = ""
    name: str = ""

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Adds this component's nodes and parameters; returns the node that holds its result."""
        raise NotImplementedError

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        """The width of the result."""
        return inputs[0]

    def __add__(self, other: Component) -> Add:
        return Add((self, other))

    def __mul__(self, other: Component) -> Product:
        return Product((self, other))


@dataclass(frozen=True)
class Stream(Component):
    """The residual stream as it enters the block."""

    kind: ClassVar[str] = "stream"
    name: str = "x"


def stream(name: str = "x") -> Stream:
    """The residual stream of one token, `[d_model]`, as it enters the block."""
    return Stream(name)


@dataclass(frozen=True)
class Add(Component):
    """The sum of two or more signals."""

    inputs: tuple[Signal, ...]
    name: str = ""
    kind: ClassVar[str] = "add"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, AddOp(), *inputs)


@dataclass(frozen=True)
class Product(Component):
    """The element-wise product of two signals."""

    inputs: tuple[Signal, ...]
    name: str = ""
    kind: ClassVar[str] = "multiply"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, Multiply(), *inputs)


@dataclass(frozen=True)
class Scale(Component):
    """A signal times a known number."""

    input: Signal
    alpha: Number
    name: str = ""
    kind: ClassVar[str] = "scale"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, ScaleOp(to.number(self.alpha, f"{name}.alpha")), *inputs)


@dataclass(frozen=True)
class RMSNorm(Component):
    """x / sqrt(mean(x^2) + eps), times (offset + scale) unless `scale` is false."""

    input: Signal
    eps: Number = 1e-6
    scale: bool = True
    offset: float = 0.0
    name: str = ""
    kind: ClassVar[str] = "rms_norm"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        op = RMSNormOp(to.number(self.eps, f"{name}.eps"))
        if not self.scale:
            return to.add(name, op, *inputs)
        normed = to.add(f"{name}.normed", op, *inputs)
        return to.add(name, Multiply(self.offset), normed, to.store(f"{name}.scale", to.shapes[inputs[0]]))


@dataclass(frozen=True)
class LayerNorm(Component):
    """(x - mean) / sqrt(var + eps), times `scale`, plus `bias`, where they are there."""

    input: Signal
    eps: Number = 1e-5
    scale: bool = True
    bias: bool = True
    name: str = ""
    kind: ClassVar[str] = "layer_norm"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """The norm, then the scale, then the bias, as far as they are there; the last has the component's name."""
        width = to.shapes[inputs[0]]
        stages: list[tuple[Op, str]] = [(LayerNormOp(to.number(self.eps, f"{name}.eps")), "")]
        if self.scale:
            stages.append((Multiply(), "scale"))
        if self.bias:
            stages.append((AddOp(), "bias"))
        value = inputs[0]
        for i, (op, slot) in enumerate(stages):
            stored = (to.store(f"{name}.{slot}", width),) if slot else ()
            at = name if i == len(stages) - 1 else f"{name}.{slot + 'd' if slot else 'normed'}"
            value = to.add(at, op, value, *stored)
        return value


@dataclass(frozen=True)
class Linear(Component):
    """W x, plus a bias if asked for. The parameters are `weight` and `weight_bias`."""

    input: Signal
    out: int | str | None = None
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "linear"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return to.width if self.out is None else to.size(self.out)

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in = to.shapes[inputs[0]]
        return to.linear(name, "weight", inputs[0], d_in, self.width(to, (d_in,)), self.bias)


@dataclass(frozen=True)
class Activation(Component):
    """An element-wise function."""

    input: Signal
    fn: str
    name: str = ""
    kind: ClassVar[str] = "activation"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, ActivationOp(self.fn), *inputs)


@dataclass(frozen=True)
class Softcap(Component):
    """cap tanh(x / cap)."""

    input: Signal
    cap: Number
    name: str = ""
    kind: ClassVar[str] = "softcap"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, SoftcapOp(to.number(self.cap, f"{name}.cap")), *inputs)


@dataclass(frozen=True)
class Gain(Component):
    """A learned element-wise scale (LayerScale)."""

    input: Signal
    offset: float = 0.0
    name: str = ""
    kind: ClassVar[str] = "gain"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        scale = to.store(f"{name}.scale", to.shapes[inputs[0]])
        return to.add(name, Multiply(self.offset), inputs[0], scale)


@dataclass(frozen=True)
class Bias(Component):
    """A learned shift."""

    input: Signal
    name: str = ""
    kind: ClassVar[str] = "bias"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, AddOp(), inputs[0], to.store(f"{name}.bias", to.shapes[inputs[0]]))


@dataclass(frozen=True)
class MLP(Component):
    """down_proj(activation(up_proj x)), with biases if asked for."""

    input: Signal
    hidden: int | str
    activation: str = "gelu_tanh"
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "mlp"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in, hidden = to.shapes[inputs[0]], to.size(self.hidden)
        up = to.linear(name, "up_proj", inputs[0], d_in, hidden, self.bias)
        active = to.add(f"{name}.hidden", ActivationOp(self.activation), up)
        return to.linear(name, "down_proj", active, hidden, d_in, self.bias)


@dataclass(frozen=True)
class GatedMLP(Component):
    """down_proj(activation(gate_proj x) * up_proj x), with biases if asked for."""

    input: Signal
    hidden: int | str
    activation: str = "silu"
    bias: bool = False
    name: str = ""
    kind: ClassVar[str] = "gated_mlp"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        d_in, hidden = to.shapes[inputs[0]], to.size(self.hidden)
        gate = to.linear(name, "gate_proj", inputs[0], d_in, hidden, self.bias)
        up = to.linear(name, "up_proj", inputs[0], d_in, hidden, self.bias)
        active = to.add(f"{name}.gate", ActivationOp(self.activation), gate)
        product = to.add(f"{name}.hidden", Multiply(), active, up)
        return to.linear(name, "down_proj", product, hidden, d_in, self.bias)


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions: `base` of the wave lengths; `scaling` divides the positions."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    base: Number = 10000.0
    scaling: Number = 1.0


@dataclass(frozen=True)
class QKNorm:
    """RMSNorm of queries and keys, per head, times (offset + scale)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    eps: Number = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class Attention(Component):
    """Multi-head attention over the sequence, and its output projection `o_proj`.

    Args:
        heads, kv_heads, head_dim: `kv_heads` below `heads` is grouped-query attention; by default
            there are as many as heads, and head_dim is the stream's width over the heads.
        rope: rotary positions; None for none.
        qk_norm: RMSNorm on queries and keys; None for none.
        window: how many tokens back a query sees, itself included; None for all.
        softcap: attention logits are capped to cap * tanh(logit / cap).
        scale_dim: logits are divided by its square root; by default `head_dim`.
        bias, out_bias: biases on q, k, v and on o (by default as `bias`).
        fused: q, k and v come from one matrix `qkv_proj` (GPT-2's `c_attn`).
    """

    input: Signal
    heads: int | str
    kv_heads: int | str | None = None
    head_dim: int | str | None = None
    rope: RopeSettings | None = None
    qk_norm: QKNorm | None = None
    window: int | str | None = None
    softcap: Number | None = None
    scale_dim: int | str | None = None
    bias: bool = False
    out_bias: bool | None = None
    fused: bool = False
    causal: bool = True
    name: str = ""
    kind: ClassVar[str] = "attention"

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        """Projections, the mixing operation `NAME.heads`, and the output projection."""
        width, z = to.shapes[inputs[0]], inputs[0]
        heads = to.size(self.heads)
        kv_heads = to.size(self.kv_heads) if self.kv_heads is not None else heads
        head_dim = self._head_dim(to, width, heads, name)
        op = self._op(to, name, heads, kv_heads, head_dim)
        args = self._projections(to, name, z, width, heads * head_dim, kv_heads * head_dim)
        if self.qk_norm:
            args += [to.store(f"{name}.q_norm", head_dim), to.store(f"{name}.k_norm", head_dim)]
        mixed = to.add(f"{name}.heads", op, *args)
        out_bias = self.bias if self.out_bias is None else self.out_bias
        return to.linear(name, "o_proj", mixed, heads * head_dim, width, out_bias)

    def _head_dim(self, to: Lowering, width: Size, heads: Size, name: str) -> Size:
        if self.head_dim is not None:
            return to.size(self.head_dim)
        if width.known is None or heads.known is None:
            raise BadInput(f"{name}: head_dim must be given while the width or the heads are symbols")
        if not heads.known or width.known % heads.known:
            raise BadInput(f"{name}: {heads} heads do not divide the width {width}; give head_dim")
        return Size.of(width.known // heads.known)

    def _projections(self, to: Lowering, name: str, z: str, d_in: Size, q_width: Size, kv_width: Size) -> list[str]:
        if not self.fused:
            widths = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
            return [to.linear(name, slot, z, d_in, w, self.bias) for slot, w in widths.items()]
        together = to.linear(name, "qkv_proj", z, d_in, q_width + kv_width + kv_width, self.bias)
        ends = [Size.of(0), q_width, q_width + kv_width, q_width + kv_width + kv_width]
        cuts = zip("qkv", ends[:-1], ends[1:], strict=True)
        return [to.add(f"{name}.{part}", Slice(a, b), together) for part, a, b in cuts]

    def _op(self, to: Lowering, name: str, heads: Size, kv_heads: Size, head_dim: Size) -> Attend:
        rope = (
            None
            if self.rope is None
            else Rope(
                to.number(self.rope.base, f"{name}.rope.base"), to.number(self.rope.scaling, f"{name}.rope.scaling")
            )
        )
        return Attend(
            heads,
            kv_heads,
            head_dim,
            scale_dim=to.size(self.scale_dim) if self.scale_dim is not None else head_dim,
            rope=rope,
            qk_norm=RMSNormOp(to.number(self.qk_norm.eps, f"{name}.qk_norm.eps")) if self.qk_norm else None,
            qk_offset=self.qk_norm.offset if self.qk_norm else 0.0,
            window=None if self.window is None else to.size(self.window).known,
            softcap=None if self.softcap is None else to.number(self.softcap, f"{name}.softcap"),
            causal=self.causal,
        )


@dataclass(frozen=True)
class Mixer(Component):
    """Something that looks at other tokens and of which nothing else is said: judged, never run."""

    input: Signal
    out: int | str | None = None
    name: str = ""
    kind: ClassVar[str] = "mix"

    def width(self, to: Lowering, inputs: tuple[Size, ...]) -> Size:
        return inputs[0] if self.out is None else to.size(self.out)

    def lower(self, to: Lowering, name: str, inputs: tuple[str, ...]) -> str:
        return to.add(name, Mix(None if self.out is None else to.size(self.out)), *inputs)


COMPONENTS: Mapping[str, type[Component]] = {
    c.kind: c
    for c in (
        Add, Product, Scale, RMSNorm, LayerNorm, Linear, Activation, Softcap, Gain, Bias, MLP, GatedMLP,
        Attention, Mixer,
    )
}  # fmt: skip


def inputs_of(component: Component) -> tuple[Any, ...]:
    """The signals a component reads: components while a block is written, names in a Block."""
    if hasattr(component, "inputs"):
        return tuple(component.inputs)
    return (component.input,) if hasattr(component, "input") else ()


def with_inputs(component: Component, names: tuple[str, ...]) -> Component:
    """The same component reading signals by name, its own name left to the block that lists it."""
    key = "inputs" if any(f.name == "inputs" for f in fields(component)) else "input"  # type: ignore[arg-type]
    value: Any = names if key == "inputs" else names[0]
    return replace(component, **{key: value, "name": ""})  # type: ignore[type-var]


def lower(
    components: Mapping[str, Component], input: str, output: str, width: Size, constants: Mapping[str, Any],
    tied: frozenset[str] = frozenset(), frozen: frozenset[str] = frozenset(),
) -> Graph:  # fmt: skip
    """The graph of named components, which may stand in any order but a circle.

    Raises:
        BadInput: an unknown input, a cycle, or a component used with a width it cannot take.
    """
    to = Lowering(constants, width, {input: width})
    values = {input: input}
    if input in components:
        raise BadInput(f"two things are named {input!r}: the stream and a component need names of their own")
    for name in _in_order(components, input):
        component = components[name]
        names = tuple(values[i] for i in inputs_of(component))
        if not names:
            raise BadInput(f"component {name!r} ({component.kind}) reads nothing")
        try:
            values[name] = component.lower(to, name, names)
            to.shapes[values[name]] = component.width(to, tuple(to.shapes[n] for n in names))
        except BadInput as error:
            raise BadInput(f"component {name!r} ({component.kind}): {error}") from None
    marked = [replace(p, tied=p.name in tied, frozen=p.name in frozen) for p in to.parameters]
    return Graph.build(input, values[output], width, marked, to.nodes)


def _in_order(components: Mapping[str, Component], input: str) -> list[str]:
    """Names in dependency order; the checks of names and cycles are the graph's own."""
    ordered: dict[str, None] = {}
    open_: set[str] = set()
    for start in components:
        stack = [start]
        while stack:
            name = stack[-1]
            waiting = [i for i in inputs_of(components[name]) if i not in ordered and i != input]
            for i in waiting:
                if i not in components:
                    known = ", ".join([input, *components])
                    raise BadInput(f"component {name!r} reads {i!r}, which does not exist; there are {known}")
            if name in ordered:
                stack.pop()
            elif waiting:
                open_.add(name)
                if waiting[0] in open_:
                    raise BadInput(f"the components form a circle through {waiting[0]!r} and {name!r}")
                stack.append(waiting[0])
            else:
                ordered[name] = None
                open_.discard(name)
                stack.pop()
    return list(ordered)
