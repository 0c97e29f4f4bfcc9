"""One block as an exported program with numbers: what the translation to a graph reads.

The block is copied, its parameters are drawn at random (a gate that training left at zero would hide what lies
behind it) and the copy is exported by `torch.export`. Every value of the program is then worked out for a random
stream, so that whatever is said of an operation can be held against numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from blockkit.errors import BadInput, blamed

from ..calling.interface import leaves
from ..calling.numbers import foreign
from ..calling.token_rows import close
from .finding import Call, at
from .sealed import filled, program, seal
from .single_precision import SinglePrecision


@dataclass(frozen=True, eq=False)
class Twin:
    """A block's copy with random numbers, and a call of it.

    Attributes:
        state: its parameters and buffers, by name in the block.
        results: what it gives as the stream, for its own and for one that is `LOUD` times as large.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Mapping[str, Tensor]
    results: tuple[Tensor | None, ...] = ()

    def serves(self, call: Call) -> bool:
        """Whether the block of another call, with these numbers, does the same (it may heed its own place)."""
        for wanted, found in zip(self.results, _streams(call, self), strict=True):
            if wanted is None or found is None or not close(found, wanted, 1e-5):
                return False
        return True


LOUD = 100.0  # so large a stream meets limits that an ordinary one does not


def _streams(call: Call, twin: Twin) -> tuple[Tensor | None, ...]:
    """What the block of `call` gives for the twin's numbers and tensors; None if it does not run on them."""
    return tuple(_stream(call, twin, size) for size in (1.0, LOUD))


def _stream(call: Call, twin: Twin, size: float) -> Tensor | None:
    own = twin.args[call.stream] if isinstance(call.stream, int) else twin.kwargs[call.stream]
    given = [v for v in leaves((twin.args, twin.kwargs)) if isinstance(v, Tensor)]
    try:
        args, kwargs = filled((call.args, call.kwargs), iter([v * size if v is own else v for v in given]))
        with torch.no_grad(), SinglePrecision():
            found = torch.func.functional_call(call.module, dict(twin.state), args, kwargs, tie_weights=False)
        return at(found, call.result).detach()
    except Exception:
        return None


@dataclass(frozen=True)
class Exported:
    """A block's program and the values in it.

    Attributes:
        twin: the copy of the block that was exported.
        nodes: the program, in order.
        values: what every node gives, for one random stream.
        parameters: the nodes that stand for parameters, by name in the block.
        named: the nodes that stand for parameters and buffers, by their names in the block.
        given: the nodes that stand for further arguments of the call (positions, masks).
        own: those of them that hold rows of the tokens, the same with and without a context.
        stream: the node that is the residual stream.
        memory: nodes of other sequences that the block reads (an encoder's result).
        output: the node that is the stream after the block.
        tokens: how many there are.
        dtype: in which the block itself computes; the copy does so in float32.
    """

    twin: Twin
    nodes: tuple[fx.Node, ...]
    values: dict[fx.Node, Any]
    parameters: Mapping[fx.Node, str]
    named: Mapping[str, fx.Node]
    given: frozenset[fx.Node]
    own: frozenset[fx.Node]
    stream: fx.Node
    memory: frozenset[fx.Node]
    output: fx.Node
    tokens: int
    dtype: torch.dtype

    def replay(self, nodes: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The values of `nodes` (in order) when some others have the values in `given`."""
        found = dict(given)

        def value(node: fx.Node) -> Any:
            return found[node] if node in found else self.values[node]

        with torch.no_grad():
            for node in nodes:
                args = fx.map_arg(node.args, value)
                found[node] = node.target(*args, **fx.map_arg(node.kwargs, value))
        return found


def export(call: Call, tokens: int) -> Exported:
    """The block of `call`, exported with random parameters in float32 on the CPU.

    Raises:
        BadInput: `torch.export` cannot trace the block; the message says why.
    """
    twin = _twin(call, torch.Generator().manual_seed(0))
    try:
        exported = program(twin.module, twin.args, twin.kwargs)
    except Exception as error:
        try:
            if not seal(twin.module, twin.args, twin.kwargs):
                raise error
            exported = program(twin.module, twin.args, twin.kwargs)
        except Exception:
            where = call.path or type(call.module).__name__
            raise BadInput(f"the block {where} cannot be traced by torch.export: {blamed(error)}") from error
    return _with_values(exported, call, twin, tokens)


def _twin(call: Call, rng: torch.Generator) -> Twin:
    """A copy of the block with random numbers, and arguments for it."""
    where = call.path or type(call.module).__name__
    try:
        module = copy.deepcopy(call.module)
    except Exception as error:
        raise BadInput(f"the block {where} cannot be copied: {blamed(error)}") from error
    module = module.to_empty(device="cpu") if _on_meta(module) else module.to("cpu")
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and (parameter.is_floating_point() or foreign(parameter) is None):
                part._parameters[name] = nn.Parameter(_drawn(parameter, rng), parameter.is_floating_point())
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.float()
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, _plain(value))
    stream = torch.randn(call.value.shape, generator=rng)
    args, kwargs = call.called_with(stream)
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    twin = Twin(module.eval(), tuple(map(_plain, args)), {k: _plain(v) for k, v in kwargs.items()}, dict(held))
    return replace(twin, results=_streams(replace(call, module=twin.module), twin))


def _on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in [*module.parameters(), *module.buffers()])


def _drawn(parameter: Tensor, rng: torch.Generator) -> Tensor:
    """Matrices of order 1 / sqrt(d_in), vectors around one."""
    if not parameter.is_floating_point():
        return parameter.cpu()
    drawn = torch.randn(parameter.shape, generator=rng)
    return drawn / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * drawn


def _plain(value: Any) -> Any:
    """An argument on the CPU, in float32."""
    if isinstance(value, Tensor):
        moved = value.detach().cpu() if not value.is_meta else torch.zeros(value.shape, dtype=value.dtype)
        return moved.float() if moved.is_floating_point() else moved
    if isinstance(value, tuple | list):
        parts = [_plain(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _with_values(exported: Any, call: Call, twin: Twin, tokens: int) -> Exported:
    args, kwargs = twin.args, twin.kwargs
    stored: dict[str, Any] = {**exported.state_dict, **exported.constants}
    values: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, str] = {}
    named: dict[str, fx.Node] = {}
    inputs = iter(leaves((args, kwargs)))
    given: dict[fx.Node, Any] = {}
    nodes = list(exported.graph.nodes)
    placeholders = {s.arg.name: s for s in exported.graph_signature.input_specs}
    for node in nodes:
        if node.op != "placeholder":
            continue
        spec = placeholders[node.name]
        if spec.kind is InputKind.USER_INPUT:
            values[node] = given[node] = next(inputs)
            continue
        values[node] = stored[spec.target]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            named[spec.target] = node
        if spec.kind is InputKind.PARAMETER:
            parameters[node] = spec.target
    value = args[call.stream] if isinstance(call.stream, int) else kwargs[call.stream]
    stream = next(n for n, v in given.items() if v is value)
    order = list(given)
    across = {order[i] for i in call.across}
    memory = frozenset(n for n, v in given.items() if n in across or _other_sequence(v, tokens, value))
    own = frozenset(order[i] for i in call.own)
    calls = tuple(n for n in nodes if n.op == "call_function")
    gets = [n for n in nodes if n.op == "get_attr"]
    values.update({n: getattr(exported.graph_module, n.target) for n in gets})
    others = frozenset(given) - memory - own - {stream}
    dtype = call.value.dtype
    found = Exported(twin, calls, values, parameters, named, others, own, stream, memory, stream, tokens, dtype)
    values.update(found.replay(calls, {}))
    return replace(found, output=_result(exported, call, nodes))


def _other_sequence(value: Any, tokens: int, stream: Tensor) -> bool:
    """Whether an argument holds vectors of other tokens than the stream's: what cross-attention reads."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 3:
        return False
    return tokens not in value.shape and value.shape[0] == stream.shape[0] and value.shape[1] > 1


def _result(program: Any, call: Call, nodes: list[fx.Node]) -> fx.Node:
    """The node of the stream after the block; results stand in the program in the order of the leaves."""
    returned = next(n for n in nodes if n.op == "output").args[0]
    shape = tuple(call.out.shape)
    for node in returned:
        if isinstance(node, fx.Node) and tuple(getattr(node.meta.get("val"), "shape", ())) == shape:
            return node
    raise BadInput(f"the block {call.path}: its exported program does not give the residual stream")
