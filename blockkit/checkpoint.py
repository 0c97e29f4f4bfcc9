"""Models on disk: a Hugging Face configuration as an architecture, its tensors as parameter slots.

Everything that is particular to a family (names, orientation, which settings are supported) stands
in the `checkpoint` section of its catalogue entry; this file only follows it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import catalog
from .architecture import Architecture, Layers
from .errors import BadInput
from .weights.folder import CheckpointFolder, open_folder


def slots(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every stored array of a runnable model, as `layers.3.mlp.down_proj`, with its shape.

    Raises:
        BadInput: a size has no number yet, or the architecture is not a whole model.
    """
    if architecture.embedding is None or architecture.final is None or architecture.depth is None:
        raise BadInput(
            f"{architecture.name} is not a whole model: it needs embedding, final, head and layers with numbers"
        )
    width, embedding = architecture.size(architecture.width), architecture.embedding
    vocabulary = architecture.size(embedding.vocabulary)
    yield "embedding", _numbers("embedding", (vocabulary, width))
    if embedding.positions is not None:
        yield "positions", _numbers("positions", (architecture.size(embedding.positions), width))
    seen: set[str] = set()
    for layer in range(architecture.depth):
        for p in architecture.graphs[architecture.kind_at(layer)].parameters:
            name = stored_name(architecture, layer, p.name)
            if name not in seen:
                seen.add(name)
                yield name, _numbers(name, p.shape)
    for p in architecture.graph_of(architecture.final).parameters:
        yield f"final.{p.name}", _numbers(p.name, p.shape)
    if not architecture.tied:
        yield "head", _numbers("head", (vocabulary, width))


def stored_name(architecture: Architecture, layer: int, parameter: str) -> str:
    """Where a layer's parameter is stored; a tied one is stored once for all layers of its kind."""
    kind = architecture.kind_at(layer)
    tied = architecture.graphs[kind].parameter[parameter].tied
    return f"shared.{kind}.{parameter}" if tied else f"layers.{layer}.{parameter}"


def _numbers(name: str, shape: Any) -> tuple[int, ...]:
    known = tuple(s.known for s in shape)
    if any(k is None for k in known):
        raise BadInput(f"{name} has the shape {', '.join(map(str, shape))}: give every symbol a number in `constants`")
    return tuple(int(k) for k in known if k is not None)


@dataclass(frozen=True)
class Model:
    """A checkpoint folder with the architecture that its configuration describes."""

    architecture: Architecture
    folder: CheckpointFolder
    conventions: Mapping[str, Any]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[str, bool]]:
        """For each parameter slot, its tensor and whether that is stored transposed ([in, out]).

        Raises:
            BadInput: tensors are missing, misshapen or unknown; all of them are named.
        """
        prefix, found, faults = self._prefix(), {}, []
        for name, shape in slots(self.architecture):
            tensor, transposed = self._tensor_name(name, prefix)
            found[name] = (tensor, transposed)
            stored = self.folder.shapes.get(tensor)
            wanted = tuple(reversed(shape)) if transposed else shape
            if stored is None:
                faults.append(f"{tensor} is missing")
            elif tuple(stored) != wanted:
                faults.append(f"{tensor} has shape {list(stored)}, expected {list(wanted)}")
        ignored = [prefix + p for p in self.conventions.get("ignored", [])] + ["lm_head.weight"]
        used = {t for t, _ in found.values()}
        for tensor in self.folder.shapes:
            if tensor not in used and not any(fnmatchcase(tensor, p) for p in ignored):
                faults.append(f"{tensor} is not part of {self.architecture.name}")
        if faults:
            shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise BadInput(f"{self.folder.path}: the tensors do not fit the configuration: {shown}")
        return found

    def _prefix(self) -> str:
        """The prefix under which most of the slots' tensors are there."""
        names = [name for name, _ in slots(self.architecture)]

        def found(prefix: str) -> int:
            return sum(self._tensor_name(name, prefix)[0] in self.folder.shapes for name in names)

        return max(map(str, self.conventions.get("prefixes", [""])), key=found)

    def _tensor_name(self, slot: str, prefix: str) -> tuple[str, bool]:
        parts = slot.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        pattern = ".".join(["layers", "*", *parts[2:]]) if layer else slot
        entry = self.conventions["tensors"].get(pattern)
        if entry is None:
            raise BadInput(f"{self.architecture.name}: no tensor is known for the parameter {slot}")
        tensor = entry if isinstance(entry, str) else entry["tensor"]
        transposed = not isinstance(entry, str) and bool(entry.get("transpose"))
        place = "" if slot == "head" else prefix
        return place + tensor.replace("*", layer, 1), transposed

    def parameter(self, slot: str) -> np.ndarray:
        """The values of one slot in the kit's orientation: `[d_out, d_in]` or `[width]`."""
        tensor, transposed = self.tensors[slot]
        value = self.folder.tensor(tensor)
        return value.T if transposed else value

    def stored(self, slot: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        """A slot's values as the checkpoint names and orients them."""
        tensor, transposed = self.tensors[slot]
        return tensor, np.ascontiguousarray(value.T if transposed else value)

    def fingerprint(self, changed: list[str]) -> dict[str, str]:
        """What a patch must find again: the architecture, and the weights that it was made for."""
        digest = hashlib.sha256()
        for slot in sorted(changed):
            digest.update(slot.encode())
            digest.update(np.ascontiguousarray(self.parameter(slot)).tobytes())
        return {"architecture": self.architecture.name, "weights": digest.hexdigest()}


def open_model(path: Path) -> Model:
    """The model in a Hugging Face checkpoint folder.

    Raises:
        BadInput: the folder, its configuration or its tensors cannot be used.
    """
    folder = open_folder(path)
    architecture, conventions = from_config(folder.config, str(path))
    model = Model(architecture, folder, conventions)
    _ = model.tensors
    return model


def architecture_from_config(path: Path) -> Architecture:
    """The architecture that a `config.json` (or the folder that holds one) describes.

    Raises:
        BadInput: no such file, malformed JSON, or a model type or setting that is not supported.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"no config.json at {path}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise BadInput(f"{file}: expected a JSON object")
    return from_config(config, str(file))[0]


def from_config(config: Mapping[str, Any], source: str) -> tuple[Architecture, Mapping[str, Any]]:
    """The catalogue's architecture with the numbers of a Hugging Face configuration put in."""
    entries = {}
    for family in catalog.families():
        found = catalog.entry(family)
        if found.checkpoint:
            entries[found.checkpoint["model_type"]] = found
    entry = entries.get(str(config.get("model_type")))
    if entry is None or entry.checkpoint is None:
        known = ", ".join(sorted(entries))
        raise BadInput(
            f"{source}: model_type {config.get('model_type')!r} is not supported; supported are {known}. "
            "Any other block can be judged by writing it down as a YAML spec (see the README, section Specs)"
        )
    rules = entry.checkpoint
    _check_settings(config, rules.get("requires", {}), source)
    constants: dict[str, Any] = {}
    for name, keys in rules["constants"].items():
        value = _first(config, keys if isinstance(keys, list) else [keys], constants)
        if value is None:
            raise BadInput(f"{source}: {keys} is missing, from which {name} is taken")
        constants[name] = value
    architecture = entry.bound(constants, entry.family)
    if "layer_types" in rules:
        architecture = _with_layer_types(architecture, config, rules["layer_types"], source)
    return architecture, rules


def _check_settings(config: Mapping[str, Any], requires: Mapping[str, list[Any]], source: str) -> None:
    for key, allowed in requires.items():
        value = _look(config, key)
        if value not in allowed:
            shown = ", ".join(str(a) for a in allowed if a is not None) or "none"
            raise BadInput(
                f"{source}: {key} = {value!r} is not supported for this family (allowed: {shown}); write a spec"
            )


def _look(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _first(config: Mapping[str, Any], keys: list[Any], constants: Mapping[str, Any]) -> Any:
    """The first key that the configuration has; `= formula` computes from the constants before it."""
    for key in keys:
        if str(key).startswith("="):
            return _formula(ast.parse(str(key)[1:].strip(), mode="eval").body, constants)
        if (value := _look(config, str(key))) is not None:
            return value
    return None


def _formula(node: ast.AST, constants: Mapping[str, Any]) -> Any:
    """Arithmetic over constants: names, numbers, * and //, sqrt(...)."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return constants[name]
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _formula(left, constants) * _formula(right, constants)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return _formula(left, constants) // _formula(right, constants)
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            return math.sqrt(_formula(inner, constants))
    raise BadInput(f"a catalogue formula may not hold {ast.dump(node)}")


def _with_layer_types(
    architecture: Architecture, config: Mapping[str, Any], rule: Mapping[str, str], source: str
) -> Architecture:
    """Which block stands in which layer, where the configuration lists it."""
    from dataclasses import replace

    listed = config.get(rule["key"])
    if listed is None:
        return architecture
    unknown = [t for t in listed if t not in rule]
    if unknown:
        raise BadInput(
            f"{source}: {rule['key']} holds {unknown[0]!r}; known are {', '.join(k for k in rule if k != 'key')}"
        )
    return replace(architecture, layers=Layers(tuple(rule[t] for t in listed), len(listed)))
