"""A Hugging Face configuration as an architecture: follows the catalogue's rules (see `blockkit.checkpoint.model`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..design import catalog
from ..design.architecture import Architecture, Layers
from ..design.documents import MOST_INTEGER, shown
from ..errors import BadInput
from .formula import evaluated

ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu", "leaky_relu": "leaky_relu",
    "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip
MAPS: Mapping[str, Mapping[Any, Any]] = {"activations": ACTIVATIONS}
NOTHING = object()  # the value that takes a setting away
ABSENT = object()
MERGED = ("requires", "constants", "settings", "tensors")


def from_config(config: Mapping[str, Any], source: str) -> tuple[Architecture, Mapping[str, Any]]:
    """The catalogue's architecture with a configuration put in, and the rules that hold for it.

    Raises:
        BadInput: a model type or setting that is not supported, or a number that is missing.
    """
    config, nested = _language_part(config)
    entry = _entry(config, source)
    rules = _with_cases(entry.checkpoint or {}, config)
    rules = _nested(rules) if nested else rules
    constants: dict[str, Any] = {}
    for name, keys in rules["constants"].items():
        value = _first(config, keys, constants, source)
        if value is None:
            raise BadInput(f"{source}: {keys} is missing, from which {name} is taken")
        if not isinstance(value, int | float) or not -MOST_INTEGER <= value <= MOST_INTEGER:
            raise BadInput(f"{source}: {keys}, from which {name} is taken: {shown(value)} is no number, or too large")
        constants[name] = value
    _check_settings(config, rules.get("requires", {}), constants, source)
    found = {path: _first(config, keys, constants, source) for path, keys in rules.get("settings", {}).items()}
    settings = {path: None if value is NOTHING else value for path, value in found.items() if value is not None}
    try:
        architecture = entry.bound({**constants, **settings}, entry.family)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    if "layer_types" in rules:
        architecture = _with_layer_types(architecture, config, rules["layer_types"], source)
    return architecture.with_used_blocks(), rules


def supported() -> Mapping[str, str]:
    """The catalogue's families by the model type of their checkpoints."""
    return catalog.model_types()


def _language_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The section `text_config` of a model of texts and images, where that is of a supported type; or all of it."""
    inner, types = config.get("text_config"), supported()
    known = [isinstance(c, Mapping) and isinstance(c.get("model_type"), str) and c["model_type"] in types
             for c in (config, inner)]  # fmt: skip
    if known != [False, True] or not isinstance(inner, Mapping):
        return config, False
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {**inner, **tied}, True


def _nested(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The rules for a language model inside another model: its tensors have another prefix, others are not its own."""

    def inner(rule: Any) -> Any:
        if isinstance(rule, list):
            return [inner(r) for r in rule]
        key = next((k for k in ("tensor", "stack") if k in rule), None) if isinstance(rule, Mapping) else None
        return {**rule, key: inner(rule[key])} if key else str(rule).removeprefix("model.")

    tensors = {slot: inner(rule) for slot, rule in rules["tensors"].items()}
    if "head" in tensors:
        tensors["head"] = [*_listed(tensors["head"]), "language_model.lm_head.weight"]
    prefixes = ["model.language_model.", "language_model.model."]
    return {**rules, "tensors": tensors, "prefixes": prefixes, "nested": True}


def _entry(config: Mapping[str, Any], source: str) -> catalog.Entry:
    families, wanted = supported(), config.get("model_type")
    if not isinstance(wanted, str) or wanted not in families:
        raise BadInput(
            f"{source}: model_type {wanted!r} is not supported; supported are {', '.join(sorted(families))}. "
            "Any other block can be judged by writing it down as a YAML spec (see the README, section Specs)"
        )
    return catalog.entry(families[wanted])


def _with_cases(rules: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The rules with those of every case whose settings the configuration has."""
    found = dict(rules)
    for case in rules.get("cases", ()):
        if all(_holds(config, key, _listed(allowed)) for key, allowed in case["when"].items()):
            found.update({part: {**found.get(part, {}), **case[part]} for part in MERGED if part in case})
    return found


def _holds(config: Mapping[str, Any], key: str, allowed: list[Any]) -> bool:
    """Whether a setting is one of those; `given null` is a null that stands there, null also one that does not."""
    if allowed == ["given null"]:
        return _look(config, key, ABSENT) is None
    return _look(config, key) in allowed


def _check_settings(
    config: Mapping[str, Any], requires: Mapping[str, Any], constants: Mapping[str, Any], source: str
) -> None:
    for key, listed in requires.items():
        value = _look(config, key)
        allowed = [evaluated(a[1:], constants) if str(a).startswith("=") else a for a in _listed(listed)]
        if value not in allowed:
            shown = ", ".join(str(a) for a in allowed if a is not None) or "none"
            raise BadInput(
                f"{source}: {key} = {value!r} is not supported for this family (allowed: {shown}); write a spec"
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _look(config: Any, dotted: str, absent: Any = None) -> Any:
    for part in dotted.split("."):
        config = config.get(part, absent) if isinstance(config, Mapping) else absent
    return config


def _first(config: Mapping[str, Any], rules: Any, constants: Mapping[str, Any], source: str) -> Any:
    """What the first rule that gives anything gives; None if none does."""
    for rule in _listed(rules):
        if (value := _given(config, rule, constants, source)) is not None:
            return value
    return None


def _given(config: Mapping[str, Any], rule: Any, constants: Mapping[str, Any], source: str) -> Any:
    if isinstance(rule, Mapping) and "value" in rule:
        return NOTHING if rule["value"] is None else rule["value"]
    if isinstance(rule, Mapping):
        value, names = _look(config, rule["key"]), rule["map"]
        table = MAPS[names] if isinstance(names, str) else names
        if value is None:
            return None
        if value not in list(table):
            known = ", ".join(str(k) for k in table)
            raise BadInput(
                f"{source}: {rule['key']} = {value!r} is not supported for this family (allowed: {known}); write a spec"
            )
        return table[value]
    if str(rule).startswith("="):
        try:
            return evaluated(str(rule)[1:], constants)
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from None
    return _look(config, str(rule))


def _with_layer_types(
    architecture: Architecture, config: Mapping[str, Any], rule: Mapping[str, str], source: str
) -> Architecture:
    """Which block stands in which layer, where the configuration lists it."""
    listed = config.get(rule["key"])
    if listed is None:
        return architecture
    if not isinstance(listed, list) or not listed:
        raise BadInput(f"{source}: {rule['key']} must list a type for every layer, got {listed!r:.60}")
    unknown = [t for t in listed if t not in list(rule)]
    if unknown:
        raise BadInput(
            f"{source}: {rule['key']} holds {unknown[0]!r}; known are {', '.join(k for k in rule if k != 'key')}"
        )
    if architecture.depth not in (None, len(listed)):
        raise BadInput(f"{source}: {rule['key']} lists {len(listed)} layers, but there are {architecture.depth}")
    return replace(architecture, layers=Layers(tuple(rule[t] for t in listed), len(listed)))
