"""What a component is: settings that lower to primitive operations; and the sums and products of signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BadInput
from ...graph.graph import Node, Parameter
from ...graph.ops import Add as AddOp
from ...graph.ops import MatMul, Multiply, Op
from ...graph.sizes import Size
from .fields import require_fields, require_signal

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
    """Base of the components; `kind` is the name in YAML.

    Raises:
        BadInput: a setting has a wrong type, or a signal is none.
    """

    kind: ClassVar[str] = ""
    name: str = ""

    def __post_init__(self) -> None:
        """Refuses settings of a wrong type, and signals that are none; what reads them is told which."""
        require_fields(self)
        for signal in inputs_of(self):
            require_signal(signal, f"{type(self).__name__} reads", Component)

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


def inputs_of(component: Component) -> tuple[Any, ...]:
    """The signals a component reads: components while a block is written, names in a Block."""
    if hasattr(component, "inputs"):
        inputs = component.inputs
        if not isinstance(inputs, tuple | list):
            raise BadInput(f"{type(component).__name__}: inputs must be a list of signals, got {inputs!r:.80}")
        return tuple(inputs)
    return (component.input,) if hasattr(component, "input") else ()


def with_inputs(component: Component, names: tuple[str, ...]) -> Component:
    """The same component reading signals by name, its own name left to the block that lists it."""
    key = "inputs" if any(f.name == "inputs" for f in fields(component)) else "input"  # type: ignore[arg-type]
    value: Any = names if key == "inputs" else names[0]
    return replace(component, **{key: value, "name": ""})  # type: ignore[type-var]
