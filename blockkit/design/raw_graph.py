"""Raw graphs: the form to which every front end lowers, and which other programs may read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from ..errors import BadInput
from ..graph.graph import Graph, Node, Parameter
from ..graph.ops import (
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
    Softcap,
    Softmax,
)
from ..graph.ops.custom import Custom
from ..graph.ops.mixing import MixingOp
from ..graph.ops.routing import Clamp, Repeat, TopK
from ..graph.sizes import Size
from .documents import Place, check_keys, mapping, name_at, placed, plain, shown, size_at


def graph_from(document: Any, place: Place) -> Graph:
    """A raw graph: `{"graph": {"input", "output", "width", "parameters", "nodes"}}`, nodes in any order.

    Raises:
        BadInput: anything that does not fit, with its place.
    """
    top = mapping(document, place)
    allowed = ("input", "output", "width", "parameters", "nodes")
    for key in [*top, *allowed]:
        if key not in allowed or key not in top:
            what = "unknown" if key not in allowed else "missing"
            raise BadInput(f"{place}: {what} key {key!r}; a graph has exactly {', '.join(allowed)}")
    stored, listed = (place.at(k, top[k]) for k in ("parameters", "nodes"))
    parameters = [_raw_parameter(str(n), v, stored.at(n, v)) for n, v in mapping(top["parameters"], stored).items()]
    nodes = [_raw_node(str(n), v, listed.at(n, v)) for n, v in mapping(top["nodes"], listed).items()]
    width = size_at(top["width"], place.at("width", None))
    ends = [name_at(top[k], place.at(k, None)) for k in ("input", "output")]
    try:
        return Graph.build(ends[0], ends[1], width, parameters, nodes)
    except BadInput as error:
        raise placed(error, place, listed, stored) from None


def _raw_parameter(name: str, document: Any, place: Place) -> Parameter:
    settings = mapping(document, place)
    check_keys(Parameter, settings, place, hidden=("name",))
    if not isinstance(settings["shape"], list):
        raise BadInput(f"{place}: shape must be a list, as [6] or [10, 6]")
    flags = {k: settings.get(k, False) for k in ("tied", "frozen")}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise BadInput(f"{place}: {key} must be true or false, got {shown(flag)}")
    return Parameter(name, tuple(size_at(s, place) for s in settings["shape"]), **flags)


OPS: Mapping[str, type[Op]] = {
    op.kind: op
    for op in (
        Add, Multiply, Scale, MatMul, RMSNorm, LayerNorm, Activation, Softcap, Softmax, Concat, Slice, TopK, Repeat,
        Clamp, Mix, Opaque,
    )
}  # fmt: skip


def _raw_node(name: str, document: Any, place: Place) -> Node:
    settings = dict(plain(mapping(document, place)))
    kind, args = settings.pop("op", None), settings.pop("args", [])
    if not isinstance(kind, str) or kind not in OPS:
        raise BadInput(f"{place}: unknown op {kind!r}; allowed are {', '.join(OPS)}")
    if not isinstance(args, list) or not all(isinstance(a, str) for a in args):
        raise BadInput(f"{place}: args must be a list of names")
    cls = OPS[kind]
    allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, value in settings.items():
        if key not in allowed:
            raise BadInput(
                f"{place}: unknown key {key!r} for {kind}; allowed are op, args{''.join(', ' + a for a in allowed)}"
            )
        settings[key] = _setting(key, value, _hints(cls)[key], place)  # type: ignore[arg-type]
    try:
        return Node(name, cls(**settings), tuple(args))
    except TypeError:
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]  # type: ignore[arg-type]
        raise BadInput(f"{place}: {kind} needs {', '.join(missing)}") from None
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


@cache
def _hints(cls: type[Op]) -> dict[str, Any]:
    return get_type_hints(cls)


def _setting(key: str, value: Any, hint: Any, place: Place) -> Any:
    """A setting of an operation, of the type that the operation declares."""
    kinds = get_args(hint) or (hint,)
    if Size in kinds:
        return size_at(value, place)
    if bool in kinds:
        allowed, fits = "true or false", isinstance(value, bool)
    elif float in kinds or int in kinds:
        allowed, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
        if float not in kinds:
            allowed, fits = "a whole number", fits and isinstance(value, int)
    else:
        allowed, fits = "a name", isinstance(value, str)
    if not fits:
        raise BadInput(f"{place}: {key} must be {allowed}, got {value!r}")
    return value


def raw_graph(graph: Graph) -> Graph:
    """The block as others see it. What mixes tokens becomes a `mix` node: its inside plays no part in a plan."""
    nodes = []
    for node in graph.nodes:
        if isinstance(node.op, MixingOp):
            node = Node(node.name, Mix(graph.shapes[node.name][0]), node.args[: node.op.signals])
        nodes.append(node)
    read = {a for node in nodes for a in node.args}
    kept = [p for p in graph.parameters if p.name in read]
    return Graph.build(graph.input, graph.output, graph.width, kept, nodes)


def graph_document(graph: Graph) -> dict[str, Any]:
    """The document of `raw_graph(graph)`, which `graph_from` reads back."""
    raw = raw_graph(graph)
    nodes = {node.name: {"op": node.op.kind, "args": list(node.args), **_settings(node.op)} for node in raw.nodes}
    parameters = {
        p.name: {"shape": [s.json() for s in p.shape], **{k: True for k in ("tied", "frozen") if getattr(p, k)}}
        for p in raw.parameters
    }
    return {"graph": {"input": graph.input, "output": graph.output, "width": graph.width.json(),
                      "parameters": parameters, "nodes": nodes}}  # fmt: skip


def _settings(op: Any) -> dict[str, Any]:
    of: Any = op.operation if isinstance(op, Custom) else op
    settings = {f.name: getattr(of, f.name) for f in fields(of)}
    if isinstance(op, Custom):
        settings = {k: v for k, v in settings.items() if k not in ("input", "inputs", "name")}
    return {k: v.json() if isinstance(v, Size) else v for k, v in settings.items() if v is not None}
