"""The architectures that come with blockkit, as YAML; the only place where any is known by name.

An entry holds an `architecture` with symbols, `variants` that give the symbols numbers (and, by a dotted
path, settings of the architecture: `layers.pattern: [two_norms]`), and, where there are checkpoints, a
`checkpoint` section that says how they name things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ...errors import BadInput
from ...graph.graph import suggest
from ..architecture import Architecture
from ..spec import Place, architecture_from, parse_document


@dataclass(frozen=True)
class Entry:
    """One family: the symbolic architecture, its variants and its checkpoints' conventions."""

    family: str
    architecture: Architecture
    variants: Mapping[str, Mapping[str, Any]]
    checkpoint: Mapping[str, Any] | None
    document: Mapping[str, Any]  # of the architecture, as it was read

    def bound(self, values: Mapping[str, Any], name: str) -> Architecture:
        """The architecture with numbers for symbols and, where a key is a dotted path, changed settings."""
        settings = {key: value for key, value in values.items() if "." in key}
        known = {**self.architecture.constants, **{k: v for k, v in values.items() if k not in settings}}
        found = self.architecture
        if settings:
            document = deepcopy(dict(self.document))
            for path, value in settings.items():
                self._set(document, path, value)
            found = architecture_from(document, Place(f"catalogue entry {self.family}")).with_used_blocks()
        return replace(found, constants=known, name=name)

    def _set(self, document: dict[str, Any], path: str, value: Any) -> None:
        *outer, last = path.split(".")
        places = list(_places(document, outer))
        if not places:
            raise BadInput(f"catalogue entry {self.family}: the path {path} leads nowhere")
        for place in places:
            place[last] = value


def _places(document: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    """The mappings that a path leads to; `*` is any key."""
    if not path:
        yield document
        return
    for key in document if path[0] == "*" else [path[0]]:
        if isinstance(document.get(key), Mapping):
            yield from _places(document[key], path[1:])


@cache
def entry(family: str) -> Entry:
    """The entry of a family, read from its file."""
    document, place = parse_document(_text(family), f"catalogue entry {family}")
    where = place.at("architecture", document["architecture"])
    variants = {str(k): v for k, v in document.get("variants", {}).items()}
    built = architecture_from(document["architecture"], where)
    return Entry(family, built, variants, document.get("checkpoint"), document["architecture"])


@cache
def families() -> tuple[str, ...]:
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def _text(family: str) -> str:
    return (resources.files(__name__) / f"{family}.yaml").read_text(encoding="utf-8")


# Names are found by their lines: to parse every entry would take most of a command's time.
_VARIANTS = re.compile(r"^variants:\n((?:  .*\n|\n)+)", re.MULTILINE)
_VARIANT = re.compile(r"^  ([^\s:#]+):", re.MULTILINE)
_MODEL_TYPE = re.compile(r"^  model_type: (\S+)$", re.MULTILINE)


@cache
def _names() -> Mapping[str, tuple[str, str]]:
    """The family and variant (none: "") that each name stands for."""
    found = {}
    for family in families():
        found[family] = (family, "")
        section = _VARIANTS.search(_text(family))
        for variant in _VARIANT.findall(section[1]) if section else ():
            found[f"{family}-{variant}"] = (family, variant)
    return found


def names() -> list[str]:
    """Every name that `load` takes: families (with symbolic sizes) and their variants."""
    return list(_names())


@cache
def model_types() -> Mapping[str, str]:
    """The family by the `model_type` of its checkpoints."""
    found = ((_MODEL_TYPE.search(_text(family)), family) for family in families())
    return {match[1]: family for match, family in found if match}


def load(name: str) -> Architecture:
    """The catalogue's architecture of that name.

    Raises:
        BadInput: there is none; the message lists what there is.
    """
    if name not in _names():
        raise BadInput(f"no architecture {name!r} in the catalogue{suggest(name, names())}")
    family, variant = _names()[name]
    found = entry(family)
    return found.bound(dict(found.variants[variant]), name) if variant else found.architecture
