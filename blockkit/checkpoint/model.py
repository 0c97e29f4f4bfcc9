"""Models on disk: a Hugging Face configuration as an architecture, its tensors as parameter slots.

Everything that is particular to a family stands in the `checkpoint` section of its catalogue entry; this
file, `configuration.py` and `tensor_rules.py` only follow it. The section's keys:

    model_type: falcon                  # of config.json
    requires: {hidden_act: [silu]}      # KEY: allowed values (null: absent; "= formula" of constants); else refused
    constants: {d_ff: [n_inner, = 4 * d_model]}        # numbers for the architecture's symbols, in this order
    settings: {blocks.*.nodes.attention.bias: attention_bias}
                                        # PATH: VALUE, put in the `architecture` section; `*` is any key
    cases:                              # where `when` holds (KEY: value or values; null: absent or null, given null:
                                        # null and not absent), more rules of the other kinds,
      - when: {parallel: false}         # which take the place of those above
        settings: {layers.pattern: {value: [sequential]}}
    layer_types: {key: layer_types, full_attention: global}     # block by what the configuration lists for a layer
    prefixes: ["", "transformer."]      # before every tensor but the head's: the one that fits
    ignored: [h.*.attn.bias]            # tensors that are no parameters
    tensors: {SLOT: TENSOR}             # for every parameter slot; `*` is the layer

A VALUE is a key of config.json (`a.b` reaches into a section), `= formula` of the constants so far (see
`formula.py`), `{key: hidden_act, map: activations}` (or a map written out), or `{value: anything}` (null takes the
setting away); or a list
of them: the first that gives anything. Constants must be found; a setting that is not stays as it was.

A TENSOR is a name, for a tensor in the kit's orientation (`[d_out, d_in]` or `[width]`), or says more:

    {tensor: c_attn.weight, transpose: true}           # stored [d_in, d_out]; or a list, the order of its axes
    {tensor: qkv.weight, shape: [heads, 3, head_dim, d_model], take: {1: 0}}
                                        # reshaped, then taken of each AXIS an index or [start, stop]; formulas
    {stack: experts.#.w1.weight, count: experts, axis: 0}       # one tensor each (`#`), joined along a slot's axis

in the order shape, take, transpose, and then reshaped to the slot. A list of them is tried in order (names
differ between releases): the first whose tensors are there. Many slots may lie in one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..design.architecture import Architecture
from ..design.documents import read_document
from ..errors import BadInput, ExactnessLost
from ..graph.changes import Change, dense
from ..progress import Progress, silent
from .cache import resolve_model
from .configuration import from_config
from .dtypes import rounded
from .folder import CheckpointFolder, open_folder
from .formula import evaluated
from .identity import tensors_digest
from .tensor_rules import Part, part_of

__all__ = ["Model", "architecture_from_config", "from_config", "open_model", "slots", "stored_name"]

BUFFERS = ("*rotary_emb.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached")  # recomputed, never read
MOST_LAYERS = 10_000
OUTSIDE = ("head", "head_bias")  # slots whose tensors stand outside the prefix


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
    for name, block in (("stem", architecture.stem), ("final", architecture.final)):
        for p in architecture.graph_of(block).parameters if block else ():
            yield f"{name}.{p.name}", _numbers(p.name, p.shape)
    if not architecture.tied:
        yield "head", _numbers("head", (vocabulary, width))
    if architecture.head is not None and architecture.head.bias:
        yield "head_bias", _numbers("head_bias", (vocabulary,))


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
    def parts(self) -> Mapping[str, Part]:
        """For each parameter slot, where its values lie.

        Raises:
            BadInput: tensors are missing, misshapen or unknown; all of them are named.
        """
        prefix = self._prefix()
        found = {name: self._part(name, shape, prefix) for name, shape in self._slots}
        faults = list(dict.fromkeys(f for p in found.values() if (f := p.fault(self.folder.shapes))))
        ignored = [prefix + p for p in self.conventions.get("ignored", [])] + [self._head_name, *BUFFERS]
        beside = not self.conventions.get("nested")  # whether a tensor outside the prefix is one too many
        used = {tensor for part in found.values() for tensor in part.tensors}
        for tensor in self.folder.shapes:
            own = beside or tensor.startswith(prefix)
            if own and tensor not in used and not any(fnmatchcase(tensor, p) for p in ignored):
                faults.append(f"{tensor} is not part of {self.architecture.name}")
        if faults:
            shown = "; ".join(f"{fault:.300}" for fault in faults[:8]) + (
                f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            )
            raise BadInput(f"{self.folder.path}: the tensors do not fit the configuration: {shown}")
        return found

    @property
    def _head_name(self) -> str:
        """The tensor of an untied head."""
        rules = _listed(self.conventions["tensors"].get("head", "lm_head.weight"))
        names = [rule if isinstance(rule, str) else str(rule["tensor"]) for rule in rules]
        return next((name for name in names if name in self.folder.shapes), names[0])

    @property
    def has_other_head(self) -> bool:
        """Whether the configuration ties the head to the embedding, and the checkpoint has another head stored.

        `transformers` (from version 5 on) then takes the stored one.
        """
        if not self.architecture.tied or self._head_name not in self.folder.shapes:
            return False
        return not np.array_equal(self.folder.tensor(self._head_name), self.parameter("embedding"))

    @cached_property
    def _slots(self) -> list[tuple[str, tuple[int, ...]]]:
        """The model's slots; counted before they are listed, as a configuration may say any number.

        Raises:
            BadInput: the configuration asks for far more tensors than the checkpoint has.
        """
        there, layers = len(self.folder.shapes), self.architecture.depth or 0
        stacks = [rule for rules in self.conventions["tensors"].values() for rule in _listed(rules) if "stack" in rule]
        counts = [int(evaluated(rule["count"], self.architecture.constants)) for rule in stacks]
        if layers > min(there, MOST_LAYERS) or layers * max(counts, default=1) > there + MOST_LAYERS:
            raise BadInput(
                f"{self.folder.path}: the configuration asks for {layers} layers"
                f"{f' of {max(counts)} experts' if counts else ''}, and the checkpoint has {there} tensors"
            )
        try:
            return list(slots(self.architecture))
        except BadInput as error:  # sizes that no block can have
            raise BadInput(f"{self.folder.path}: {error}") from None

    def _prefix(self) -> str:
        """The prefix under which most of the slots' tensors are there."""
        wanted, there = self._slots, self.folder.shapes

        def found(prefix: str) -> int:
            return sum(all(t in there for t in self._part(*slot, prefix).tensors) for slot in wanted)

        return max(map(str, self.conventions.get("prefixes", [""])), key=found)

    def _part(self, slot: str, shape: tuple[int, ...], prefix: str) -> Part:
        """The first of the slot's rules whose tensors are there; if none is, the first."""
        parts = slot.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        pattern = ".".join(["layers", "*", *parts[2:]]) if layer else slot
        rules = self.conventions["tensors"].get(pattern)
        if rules is None:
            raise BadInput(f"{self.architecture.name}: no tensor is known for the parameter {slot}")
        place, numbers = "" if slot in OUTSIDE else prefix, self.architecture.constants
        found = [part_of(rule, shape, layer, place, numbers) for rule in _listed(rules)]
        return next((p for p in found if all(t in self.folder.shapes for t in p.tensors)), found[0])

    def parameter(self, slot: str) -> np.ndarray:
        """The values of one slot in the kit's orientation: `[d_out, d_in]` or `[width]`."""
        part = self.parts[slot]
        return part.read([self.folder.tensor(name) for name in part.tensors])

    def whole_weights(self, slots: Iterable[str]) -> dict[str, str]:
        """For each slot that is a whole `.weight` of a module, that weight's name in the causal language model.

        Some checkpoints leave out the prefix that the model's class puts before its modules' names.
        """
        prefix, full = self._prefix(), max(map(str, self.conventions.get("prefixes", [""])), key=len)
        found = {}
        for slot in slots:
            part = self.parts[slot]
            if part.whole and len(part.slot) == 2 and part.tensors[0].endswith(".weight"):
                name = part.tensors[0]
                found[slot] = name if slot in OUTSIDE else full + name.removeprefix(prefix)
        return found

    def rewritten(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The stored tensors, by name, with new values of some slots in their places."""
        changed: dict[str, np.ndarray] = {}
        for slot, value in values.items():
            part = self.parts[slot]
            for name in part.tensors:
                if name not in changed:
                    changed[name] = np.array(self.folder.tensor(name), np.float64, order="C")
            part.write([changed[name] for name in part.tensors], value)
        return changed

    def written(self, slot: str, change: Change) -> np.ndarray:
        """A changed parameter as the checkpoint will hold it, rounded to the types that its tensors are stored in.

        Raises:
            ExactnessLost: a stored type is too small for a value.
        """
        part, value = self.parts[slot], dense(self.parameter(slot), change)
        tensors = [np.zeros(self.folder.shapes[name]) for name in part.tensors]
        part.write(tensors, value)
        try:
            held = [rounded(t, self.folder.dtype_of(n)) for t, n in zip(tensors, part.tensors, strict=True)]
        except BadInput as error:
            raise ExactnessLost(f"{slot} cannot be stored with its change: {error} Choose another strategy") from None
        return part.read(held)

    def stored_dtypes(self, slots: Iterable[str]) -> frozenset[str]:
        """The types in which these slots are stored, as safetensors spells them."""
        return frozenset(self.folder.dtype_of(name) for slot in slots for name in self.parts[slot].tensors)

    def fingerprint(self) -> dict[str, str]:
        """What a patch must find again: the architecture, and all the weights that it was made for."""
        used = {name for part in self.parts.values() for name in part.tensors}
        return {
            "architecture": self.architecture.name,
            "covers": "every tensor of the checkpoint that its architecture reads, as it is stored",
            "digest": tensors_digest(self.folder, used),
        }

    def digest_of(self, changed: Iterable[str]) -> str:
        """The digest of the values of some slots alone, as patch files of format 1 hold it."""
        digest = hashlib.sha256()
        for slot in sorted(changed):
            digest.update(slot.encode())
            digest.update(np.ascontiguousarray(self.parameter(slot)).tobytes())
        return digest.hexdigest()


def _listed(rules: Any) -> list[Any]:
    return rules if isinstance(rules, list) else [rules]


def open_model(path: Path) -> Model:
    """The model in a Hugging Face checkpoint folder.

    Raises:
        BadInput: the folder, its configuration or its tensors cannot be used.
    """
    folder = open_folder(path)
    model = _model(folder, folder.config)
    if model.has_other_head:  # the stored one counts, whatever the configuration says
        model = _model(folder, folder.config | {"tie_word_embeddings": False})
    return model


def _model(folder: CheckpointFolder, config: Mapping[str, Any]) -> Model:
    architecture, conventions = from_config(config, str(folder.path))
    model = Model(architecture, folder, conventions)
    _ = model.parts
    return model


def open_checkpoint(model: str, progress: Progress | None = None) -> Model:
    """A model by name or path; a GGUF is converted once and cached.

    Raises:
        BadInput: nothing of that name or path can be opened.
    """
    return open_model(resolve_model(model, progress or silent))


def architecture_from_config(path: Path) -> Architecture:
    """The architecture that a `config.json` (or the folder that holds one) describes.

    Raises:
        BadInput: no such file, malformed JSON, or a model type or setting that is not supported.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"no config.json at {path}")
    config, _ = read_document(file, finite=False)
    if not isinstance(config, Mapping):
        raise BadInput(f"{file}: expected a JSON object")
    return from_config(config, str(file))[0]
