"""Architectures as YAML or JSON: read with a schema, written back without loss.

Unknown keys, wrong types and malformed YAML are errors that say where (file, line, column) and what
is allowed. `schema()` is the same rules as a published JSON Schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .architecture import Architecture, Block, Embedding, Head, Layers
from .attention import Attend
from .components import COMPONENTS, Component
from .errors import BadInput
from .graph import Graph, Node, Parameter, suggest
from .ops import Activation, Add, Concat, LayerNorm, MatMul, Mix, Multiply, Op, RMSNorm, Scale, Slice, Softcap, Softmax
from .sizes import Size

MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Place:
    """Where in a document something stands, for messages: `file, line 3, column 5, blocks.main`."""

    source: str
    keys: tuple[str, ...] = ()
    node: Any = None
    mark: tuple[int, ...] | None = None

    def at(self, key: str, node: Any) -> Place:
        lines = getattr(self.node, "lc", None)
        mark = lines.data.get(key) if lines is not None and lines.data else None
        return Place(self.source, (*self.keys, key), node, mark)

    def __str__(self) -> str:
        parts = [self.source]
        if self.mark:
            parts.append(f"line {self.mark[0] + 1}, column {self.mark[1] + 1}")
        return ", ".join([*parts, *([".".join(self.keys)] if self.keys else [])])


def read_document(path: Path) -> tuple[Any, Place]:
    """The parsed YAML or JSON of a file.

    Raises:
        BadInput: the file is missing, too large, or malformed (with line and column).
    """
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    if path.stat().st_size > MOST_BYTES:
        raise BadInput(f"{path} is larger than {MOST_BYTES >> 20} MiB; a spec is a small text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8); a spec is a YAML or JSON file") from None
    return parse_document(text, str(path))


def parse_document(text: str, source: str) -> tuple[Any, Place]:
    """Parses YAML (of which JSON is a part); see `read_document`."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text, object_pairs_hook=_once)
            return found, Place(source, (), found)
        except json.JSONDecodeError as error:
            if source.endswith(".json"):
                where = f"line {error.lineno}, column {error.colno}"
                raise BadInput(f"{source}, {where}: malformed JSON: {error.msg}") from None
        except RecursionError:
            raise BadInput(f"{source}: nested too deeply for a spec") from None
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        found = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{source}{where}: malformed YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise BadInput(f"{source}: malformed YAML: {error}") from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply for a spec") from None
    return found, Place(source, (), found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, every key of which is given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise BadInput(f"malformed JSON: the key {twice!r} is given twice in one object")
    return found


# -- architectures -----------------------------------------------------------------------------------


def architecture_from(document: Any, place: Place) -> Architecture:
    """The architecture that a parsed document describes.

    Raises:
        BadInput: anything that the schema does not allow, with its place.
    """
    top = _mapping(document, place)
    rest = {k: v for k, v in top.items() if k not in ("blocks", "block", "layers", "embedding", "final", "head")}
    width = top.get("width", "d_model")
    if ("blocks" in top) == ("block" in top):
        raise BadInput(f"{place}: give either `blocks` (named) or `block` (only one)")
    key = "blocks" if "blocks" in top else "block"
    listed = top["blocks"] if "blocks" in top else {"block": top["block"]}
    where = place.at(key, top[key])
    blocks = {
        str(kind): _block(value, width, where.at(str(kind), value) if "blocks" in top else where)
        for kind, value in _mapping(listed, where).items()
    }
    parts: dict[str, Any] = {"blocks": blocks}
    for key, cls in (("layers", Layers), ("embedding", Embedding), ("head", Head)):
        if top.get(key) is not None:
            parts[key] = _validated(cls, top[key], place.at(key, top[key]))
    if top.get("final") is not None:
        parts["final"] = _block(top["final"], width, place.at("final", top["final"]))
    rest.setdefault("name", Path(place.source).stem)
    for key, value in rest.items():
        at = place.at(str(key), value)
        if key == "constants":
            _mapping(value, at)
        elif key in ("name", "source", "note") and not isinstance(value, str):
            raise BadInput(f"{at}: expected text, got {value!r:.60}")
        elif key == "width" or (key == "context_length" and value is not None):
            _size(value, at)
    _check_keys(Architecture, {**rest, **parts}, place)
    try:
        return Architecture(**{**_plain(rest), **parts})
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def _block(document: Any, width: Any, place: Place) -> Block:
    top = _mapping(document, place)
    _check_keys(Block, top, place, hidden=("width",))
    for key in ("nodes", "output"):
        if key not in top:
            raise BadInput(f"{place}: a block needs `{key}`")
    where = place.at("nodes", top["nodes"])
    nodes = {
        str(name): _component(value, where.at(str(name), value))
        for name, value in _mapping(top["nodes"], where).items()
    }
    globs = {k: tuple(_strings(top[k], place.at(k, top[k]))) for k in ("tied", "frozen") if k in top}
    try:
        return Block(str(top["output"]), width, nodes, str(top.get("input", "x")), **globs)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def _component(document: Any, place: Place) -> Component:
    settings = dict(_mapping(document, place))
    kind = settings.pop("component", None)
    if not isinstance(kind, str) or kind not in COMPONENTS:
        known = ", ".join(COMPONENTS)
        raise BadInput(f"{place}: unknown component {kind!r}; allowed are {known}")
    cls = COMPONENTS[kind]
    _check_keys(cls, settings, place, hidden=("name",))
    return _validated(cls, settings, place)


def _validated(cls: Any, settings: Any, place: Place) -> Any:
    """Builds a dataclass from plain values, types checked and converted."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(cls, _mapping(settings, place), place)
    try:
        return TypeAdapter(cls).validate_python(_plain(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("int", "str", "float")))
        at = place.at(str(first["loc"][0]), None) if first["loc"] else place
        raise BadInput(f"{at}: {key or 'value'}: {first['msg']} (got {first['input']!r})") from None


def _mapping(value: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{place}: expected a mapping (key: value), got {type(value).__name__} {value!r:.60}")
    return value


def _strings(value: Any, place: Place) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadInput(f"{place}: expected a list of names or globs, got {value!r:.60}")
    return [str(v) for v in value]


def _check_keys(cls: Any, settings: Mapping[str, Any], place: Place, hidden: tuple[str, ...] = ()) -> None:
    allowed = [f.name for f in fields(cls) if f.name not in hidden]
    for key in settings:
        if key not in allowed:
            at = place.at(str(key), None)
            raise BadInput(f"{at}: unknown key {key!r}; allowed are {', '.join(allowed)}{suggest(str(key), allowed)}")
    for f in fields(cls):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name in allowed and f.name not in settings:
            raise BadInput(f"{place}: {f.name!r} is missing; allowed are {', '.join(allowed)}")


def _plain(value: Any) -> Any:
    """Plain dicts, lists and scalars, without the reader's own types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def to_document(architecture: Architecture) -> dict[str, Any]:
    """The plain document of an architecture; `architecture_from` gives the same architecture back."""
    document: dict[str, Any] = {}
    for f in fields(architecture):
        value = getattr(architecture, f.name)
        if value is None or value == "" or value == {}:
            continue
        if f.name == "blocks":
            value = {kind: _block_document(block) for kind, block in value.items()}
        elif f.name == "final":
            value = _block_document(value)
        elif f.name in ("layers", "embedding", "head"):
            value = _changed_fields(value)
        document[f.name] = _plain(value)
    return document


def _block_document(block: Block) -> dict[str, Any]:
    nodes = {name: {"component": c.kind, **_changed_fields(c)} for name, c in block.nodes.items()}
    document: dict[str, Any] = {"input": block.input, "nodes": nodes, "output": block.output}
    document.update({k: list(getattr(block, k)) for k in ("tied", "frozen") if getattr(block, k)})
    return document


def _changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(value)}
    plain = asdict(value)
    return {k: _plain(v) for k, v in plain.items() if k != "name" and getattr(value, k) != defaults[k]}


def write_yaml(architecture: Architecture, path: Path) -> None:
    """Writes the architecture as YAML."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = None
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(to_document(architecture), file)


def schema() -> dict[str, Any]:
    """The JSON Schema of architecture files."""
    from pydantic import TypeAdapter

    def of(cls: Any, hidden: tuple[str, ...] = ("name",), **extra: Any) -> dict[str, Any]:
        found = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        properties = {k: v for k, v in found["properties"].items() if k not in hidden}
        required = [k for k in found.get("required", []) if k not in hidden] + list(extra)
        return {"type": "object", "properties": {**extra, **properties}, "required": required,
                "additionalProperties": False}  # fmt: skip

    definitions: dict[str, Any] = {}
    kinds = [of(cls, component={"const": kind}) for kind, cls in COMPONENTS.items()]
    globs = {"type": "array", "items": {"type": "string"}}
    block = {
        "type": "object",
        "properties": {"input": {"type": "string"}, "output": {"type": "string"}, "tied": globs, "frozen": globs,
                       "nodes": {"type": "object", "additionalProperties": {"oneOf": kinds}}},
        "required": ["nodes", "output"],
        "additionalProperties": False,
    }  # fmt: skip
    number = {"type": ["integer", "string"]}
    for definition in definitions.values():
        definition.setdefault("additionalProperties", False)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockkit architecture",
        "type": "object",
        "properties": {
            "name": {"type": "string"}, "source": {"type": "string"}, "note": {"type": "string"},
            "width": number, "context_length": number, "constants": {"type": "object"},
            "block": block, "blocks": {"type": "object", "additionalProperties": block, "minProperties": 1},
            "layers": of(Layers), "embedding": of(Embedding), "final": block, "head": of(Head),
        },
        "oneOf": [{"required": ["block"]}, {"required": ["blocks"]}],
        "additionalProperties": False,
        "$defs": definitions,
    }  # fmt: skip


# -- raw graphs --------------------------------------------------------------------------------------


def graph_from(document: Any, place: Place) -> Graph:
    """A raw graph: `{"graph": {"input", "output", "width", "parameters", "nodes"}}`, nodes in any order.

    Raises:
        BadInput: anything that does not fit, with its place.
    """
    top = _mapping(document, place)
    allowed = ("input", "output", "width", "parameters", "nodes")
    for key in [*top, *allowed]:
        if key not in allowed or key not in top:
            what = "unknown" if key not in allowed else "missing"
            raise BadInput(f"{place}: {what} key {key!r}; a graph has exactly {', '.join(allowed)}")
    parameters = []
    at = place.at("parameters", top["parameters"])
    for name, value in _mapping(top["parameters"], at).items():
        settings = _mapping(value, at.at(str(name), value))
        _check_keys(Parameter, settings, at.at(str(name), value), hidden=("name",))
        shape = settings["shape"]
        if not isinstance(shape, list):
            raise BadInput(f"{at.at(str(name), value)}: shape must be a list, as [6] or [10, 6]")
        flags = {k: settings.get(k, False) for k in ("tied", "frozen")}
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise BadInput(f"{at.at(str(name), value)}: {key} must be true or false, got {flag!r}")
        sizes = tuple(_size(s, at.at(str(name), value)) for s in shape)
        parameters.append(Parameter(str(name), sizes, **flags))
    at = place.at("nodes", top["nodes"])
    nodes = [_raw_node(str(n), v, at.at(str(n), v)) for n, v in _mapping(top["nodes"], at).items()]
    try:
        width = _size(top["width"], place.at("width", None))
        return Graph.build(str(top["input"]), str(top["output"]), width, parameters, nodes)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def _size(value: Any, place: Place) -> Size:
    try:
        return Size.of(value)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


OPS: Mapping[str, type[Op]] = {
    op.kind: op
    for op in (Add, Multiply, Scale, MatMul, RMSNorm, LayerNorm, Activation, Softcap, Softmax, Concat, Slice, Mix)
}


def _raw_node(name: str, document: Any, place: Place) -> Node:
    settings = dict(_plain(_mapping(document, place)))
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
        if key in ("start", "stop", "width"):
            settings[key] = _size(value, place)
        elif key == "fn" and not isinstance(value, str):
            raise BadInput(f"{place}: fn must be a name, got {value!r}")
        elif key != "fn" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadInput(f"{place}: {key} must be a number, got {value!r}")
    try:
        return Node(name, cls(**settings), tuple(args))
    except TypeError:
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]  # type: ignore[arg-type]
        raise BadInput(f"{place}: {kind} needs {', '.join(missing)}") from None
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def graph_document(graph: Graph) -> dict[str, Any]:
    """The raw graph of a block. Attention becomes a `mix` node: its inside plays no part in a plan."""
    nodes: dict[str, Any] = {}
    for node in graph.nodes:
        op = Mix(graph.shapes[node.name][0]) if isinstance(node.op, Attend) else node.op
        settings = {f.name: getattr(op, f.name) for f in fields(op)}  # type: ignore[arg-type]
        shown = {k: v.json() if isinstance(v, Size) else v for k, v in settings.items() if v is not None}
        kept = node.args[:3] if isinstance(node.op, Attend) else node.args
        nodes[node.name] = {"op": op.kind, "args": list(kept), **shown}
    read = {a for n in nodes.values() for a in n["args"]}
    parameters = {
        p.name: {"shape": [s.json() for s in p.shape], **{k: True for k in ("tied", "frozen") if getattr(p, k)}}
        for p in graph.parameters
        if p.name in read
    }
    return {"graph": {"input": graph.input, "output": graph.output, "width": graph.width.json(),
                      "parameters": parameters, "nodes": nodes}}  # fmt: skip
