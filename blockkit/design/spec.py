"""Architectures as YAML or JSON: read with a schema, written back without loss.

Unknown keys, wrong types and malformed YAML are errors that say where (file, line, column) and what
is allowed. `schema()` is the same rules as a published JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, Block, Embedding, Head, Layers
from .components import Component
from .components.composite import Composite
from .documents import (
    Place,
    check_keys,
    mapping,
    name_at,
    parse_document,
    plain,
    read_document,
    shown,
    size_at,
    strings,
)
from .raw_graph import OPS, graph_document, graph_from
from .vocabulary import Vocabulary, validated

__all__ = [
    "OPS", "Place", "architecture_from", "graph_document", "graph_from", "parse_document", "read_document", "schema",
    "to_document", "write_yaml",
]  # fmt: skip


def architecture_from(document: Any, place: Place, components: Iterable[type[Component]] = ()) -> Architecture:
    """The architecture that a parsed document describes.

    Args:
        components: classes of a user's own that it may use beside the kit's components.

    Raises:
        BadInput: anything that the schema does not allow, with its place.
    """
    top = mapping(document, place)
    built = ("blocks", "block", "layers", "embedding", "stem", "final", "head")
    rest = {k: v for k, v in top.items() if k not in built}
    width = top.get("width", "d_model")
    if ("blocks" in top) == ("block" in top):
        raise BadInput(f"{place}: give either `blocks` (named) or `block` (only one)")
    at = place.at("components", top.get("components"))
    words = Vocabulary.of(components, top.get("components"), at)
    key = "blocks" if "blocks" in top else "block"
    listed = top["blocks"] if "blocks" in top else {"block": top["block"]}
    where = place.at(key, top[key])
    blocks = {
        str(kind): _block(value, width, where.at(str(kind), value) if "blocks" in top else where, words)
        for kind, value in mapping(listed, where).items()
    }
    parts: dict[str, Any] = {"blocks": blocks}
    for key, cls in (("layers", Layers), ("embedding", Embedding), ("head", Head)):
        if top.get(key) is not None:
            parts[key] = validated(cls, top[key], place.at(key, top[key]))
    for key in ("stem", "final"):
        if top.get(key) is not None:
            parts[key] = _block(top[key], width, place.at(key, top[key]), words)
    rest.setdefault("name", Path(place.source).stem)
    for key, value in rest.items():
        at = place.at(str(key), value)
        if key in ("constants", "components"):
            for name, number in mapping(value, at).items():
                if key == "constants" and not isinstance(number, int | float):
                    raise BadInput(f"{at.at(str(name), number)}: expected a number, got {shown(number)}")
        elif key in ("name", "source", "note") and not isinstance(value, str):
            raise BadInput(f"{at}: expected text, got {shown(value)}")
        elif key == "width" or (key == "context_length" and value is not None):
            size_at(value, at)
    check_keys(Architecture, {**rest, **parts}, place)
    try:
        return Architecture(**{**plain(rest), **parts})
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def _block(document: Any, width: Any, place: Place, words: Vocabulary) -> Block:
    top = mapping(document, place)
    check_keys(Block, top, place, hidden=("width", "place"))
    for key in ("nodes", "output"):
        if key not in top:
            raise BadInput(f"{place}: a block needs `{key}`")
    where = place.at("nodes", top["nodes"])
    nodes = {
        str(name): words.component(value, where.at(str(name), value))
        for name, value in mapping(top["nodes"], where).items()
    }
    globs = {k: tuple(strings(top[k], place.at(k, top[k]))) for k in ("tied", "frozen") if k in top}
    output, stream = (name_at(top.get(k, "x"), place.at(k, None)) for k in ("output", "input"))
    try:
        return Block(output, width, nodes, stream, place=place, **globs)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def to_document(architecture: Architecture) -> dict[str, Any]:
    """The plain document of an architecture; `architecture_from` gives the same architecture back."""
    document: dict[str, Any] = {}
    for f in fields(architecture):
        value = getattr(architecture, f.name)
        if value is None or value == "" or value == {}:
            continue
        if f.name == "blocks":
            value = {kind: _block_document(block) for kind, block in value.items()}
        elif f.name in ("stem", "final"):
            value = _block_document(value)
        elif f.name in ("layers", "embedding", "head"):
            value = _changed_fields(value)
        document[f.name] = plain(value)
    return document


def _block_document(block: Block) -> dict[str, Any]:
    nodes = {name: {"component": c.kind, **_settings_of(c)} for name, c in block.nodes.items()}
    document: dict[str, Any] = {"input": block.input, "nodes": nodes, "output": block.output}
    document.update({k: list(getattr(block, k)) for k in ("tied", "frozen") if getattr(block, k)})
    return document


def _settings_of(component: Component) -> dict[str, Any]:
    if not isinstance(component, Composite):
        return _changed_fields(component)
    key, one = ("input", component.inputs[0]) if len(component.inputs) == 1 else ("inputs", list(component.inputs))
    return {key: one, **component.settings}


def _changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(value)}
    settings = asdict(value)
    return {k: plain(v) for k, v in settings.items() if k != "name" and getattr(value, k) != defaults[k]}


def write_yaml(architecture: Architecture, path: Path) -> None:
    """Writes the architecture as YAML."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = None
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(to_document(architecture), file)


def schema(components: Iterable[type[Component]] = ()) -> dict[str, Any]:
    """The JSON Schema of architecture files, which may use `components` of a user's own beside the kit's.

    Which composites a file defines no schema can know: a file that has any may name any component.
    """
    from pydantic import TypeAdapter

    definitions: dict[str, Any] = {}

    def of(cls: Any, hidden: tuple[str, ...] = ("name",), **extra: Any) -> dict[str, Any]:
        found = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        properties = {k: v for k, v in found["properties"].items() if k not in hidden}
        required = [k for k in found.get("required", []) if k not in hidden] + list(extra)
        return {"type": "object", "properties": {**extra, **properties}, "required": required,
                "additionalProperties": False}  # fmt: skip

    kinds = Vocabulary.of(components).kinds
    known = {kind: of(cls, component={"const": kind}) for kind, cls in kinds.items()}
    text, number = {"type": "string"}, {"type": ["integer", "string"]}
    properties = {
        "name": text, "source": text, "note": text, "width": number, "context_length": number,
        "constants": {"type": "object"}, "layers": of(Layers), "embedding": of(Embedding), "head": of(Head),
        "components": {"type": "object", "additionalProperties": _COMPOSITE},
        "block": {}, "blocks": {"type": "object", "minProperties": 1}, "stem": {}, "final": {},
    }  # fmt: skip
    for definition in definitions.values():
        definition.setdefault("additionalProperties", False)
    definitions.update(
        block=_block_schema(known, {"enum": list(kinds)}), open_block=_block_schema(known, {"type": "string"})
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockkit architecture",
        "type": "object",
        "properties": properties,
        "oneOf": [{"required": ["block"]}, {"required": ["blocks"]}],
        "if": {"required": ["components"]},
        "then": {"properties": _all_blocks("open_block")},
        "else": {"properties": _all_blocks("block")},
        "additionalProperties": False,
        "$defs": definitions,
    }


_GLOBS = {"type": "array", "items": {"type": "string"}}
_COMPOSITE = {
    "type": "object",
    "properties": {"settings": {"type": "object"}, "input": {"type": "string"}, "inputs": _GLOBS,
                   "nodes": {"type": "object", "additionalProperties": {"type": "object", "required": ["component"]}},
                   "output": {"type": "string"}},
    "required": ["nodes", "output"],
    "oneOf": [{"required": ["input"]}, {"required": ["inputs"]}],
    "additionalProperties": False,
}  # fmt: skip


def _block_schema(kinds: dict[str, dict[str, Any]], named: dict[str, Any]) -> dict[str, Any]:
    """Of blocks whose nodes are of one of the kinds, or, as far as `named` allows, of another one."""
    cases = [{"if": {"properties": {"component": {"const": k}}}, "then": one} for k, one in kinds.items()]
    node = {"type": "object", "properties": {"component": named}, "required": ["component"], "allOf": cases}
    return {
        "type": "object",
        "properties": {"input": {"type": "string"}, "output": {"type": "string"}, "tied": _GLOBS, "frozen": _GLOBS,
                       "nodes": {"type": "object", "additionalProperties": node}},
        "required": ["nodes", "output"],
        "additionalProperties": False,
    }  # fmt: skip


def _all_blocks(definition: str) -> dict[str, Any]:
    one = {"$ref": f"#/$defs/{definition}"}
    return {"block": one, "stem": one, "final": one, "blocks": {"additionalProperties": one}}
