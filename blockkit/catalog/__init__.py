"""The architectures that come with blockkit, as YAML; the only place where any is known by name.

An entry holds an `architecture` with symbols, `variants` that give the symbols numbers, and, where
there are checkpoints, a `checkpoint` section that says how they name things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ..architecture import Architecture
from ..errors import BadInput
from ..graph import suggest
from ..spec import architecture_from, parse_document


@dataclass(frozen=True)
class Entry:
    """One family: the symbolic architecture, its variants and its checkpoints' conventions."""

    family: str
    architecture: Architecture
    variants: Mapping[str, Mapping[str, Any]]
    checkpoint: Mapping[str, Any] | None

    def bound(self, constants: Mapping[str, Any], name: str) -> Architecture:
        known = {**self.architecture.constants, **constants}
        return replace(self.architecture, constants=known, name=name)


@cache
def entry(family: str) -> Entry:
    """The entry of a family, read from its file."""
    text = (resources.files(__name__) / f"{family}.yaml").read_text(encoding="utf-8")
    document, place = parse_document(text, f"catalogue entry {family}")
    where = place.at("architecture", document["architecture"])
    variants = {str(k): v for k, v in document.get("variants", {}).items()}
    return Entry(family, architecture_from(document["architecture"], where), variants, document.get("checkpoint"))


@cache
def families() -> tuple[str, ...]:
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def names() -> list[str]:
    """Every name that `load` takes: families (with symbolic sizes) and their variants."""
    return [n for f in families() for n in (f, *(f"{f}-{v}" for v in entry(f).variants))]


def load(name: str) -> Architecture:
    """The catalogue's architecture of that name.

    Raises:
        BadInput: there is none; the message lists what there is.
    """
    for family in families():
        if name == family:
            return entry(family).architecture
        variant = name.removeprefix(f"{family}-")
        if variant != name and variant in entry(family).variants:
            return entry(family).bound(dict(entry(family).variants[variant]), name)
    raise BadInput(f"no architecture {name!r} in the catalogue{suggest(name, names())}")
