"""Every block of the catalogue at small size."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from blockkit.design import catalog
from blockkit.graph.graph import Graph
from blockkit.graph.sizes import Size

SMALL: dict[str, Any] = {
    # widths
    "d_model": 16, "d_ff": 24, "d_tokens": 10, "inner": 20, "state": 5, "dt_rank": 3,
    # experts
    "experts": 4, "top_k": 2, "shared": 12, "d_dense": 20, "groups": 2, "top_groups": 1,
    # heads
    "heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 6, "scale_dim": 4, "rope_dim": 2,
    "q_rank": 7, "kv_rank": 6, "nope_dim": 4,
    # along the sequence: wider than the sequences here, so that the context is seen
    "context_length": 64, "window": 32, "length": 24, "places": 12, "kernel": 4,
    # whole models
    "layers": 2, "vocabulary": 50, "tied": True, "embedding_scale": 4.0,
    # numbers
    "eps": 1e-6, "rope_base": 1e4, "local_rope_base": 1e4, "global_rope_base": 1e6, "rope_scaling": 1.0,
    "attention_scale": 0.5, "residual_scale": 0.3, "logit_scale": 0.5, "unit": 0.25,
}  # fmt: skip


def numbers(entry: catalog.Entry) -> dict[str, Any]:
    """A small number for every symbol of a family."""
    used = {key for variant in entry.variants.values() for key in variant if "." not in key}
    used |= {s for graph in entry.architecture.graphs.values() for s in symbols(graph)}
    unknown = ", ".join(sorted(used - SMALL.keys() - entry.architecture.constants.keys()))
    assert not unknown, f"{entry.family} uses {unknown}: give each a small number in SMALL ({__file__})"
    return {name: SMALL[name] for name in used if name in SMALL}


def designs(entry: catalog.Entry) -> dict[str, dict[str, Any]]:
    """The settings beside numbers in which variants differ from the general design, by variant."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for name, variant in entry.variants.items():
        settings = {key: value for key, value in variant.items() if "." in key}
        if settings not in found.values():
            found[name] = settings
    return found


def blocks(family: str) -> dict[str, Graph]:
    """Every block of a family at small size, those of all its designs, each once."""
    entry = catalog.entry(family)
    found: dict[str, Graph] = {}
    for name, settings in designs(entry).items():
        for kind, graph in entry.bound({**numbers(entry), **settings}, family).graphs.items():
            if graph not in found.values():
                found[f"{name} {kind}".strip()] = graph
    return found


def symbols(value: Any) -> set[str]:
    """The symbols in the shapes and settings of a graph."""
    if isinstance(value, Size):
        return set(value.symbols)
    if is_dataclass(value) and not isinstance(value, type):
        return {s for f in fields(value) for s in symbols(getattr(value, f.name))}
    if isinstance(value, tuple | list):
        return {s for v in value for s in symbols(v)}
    return {s for v in value.values() for s in symbols(v)} if isinstance(value, dict) else set()
