"""Specs to read, to spoil and to refuse."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.architecture import Architecture
from blockkit.design.spec import Place, architecture_from
from blockkit.errors import BadInput

HERE = Path(catalog.__file__).parent
VALID = jsonschema.Draft202012Validator(bk.schema())


def document_of(family: str) -> dict[str, Any]:
    """The architecture of a catalogue file, as plain data."""
    found = YAML(typ="safe", pure=True).load((HERE / f"{family}.yaml").read_text(encoding="utf-8"))
    return dict(found["architecture"])


def read(document: Mapping[str, Any]) -> Architecture:
    return architecture_from(document, Place("spec"))


def refused(text: str, tmp_path: Path, name: str = "spec.yaml") -> str:
    """The message with which a file is refused, by `load` or when its graphs are built."""
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        bk.check(file)
    return str(caught.value)


def small(**changed: Any) -> dict[str, Any]:
    """A little architecture, with parts replaced."""
    nodes = {
        "norm": {"component": "rms_norm", "input": "x"},
        "attention": {"component": "attention", "input": "norm", "heads": 2},
        "v": {"component": "add", "inputs": ["x", "attention"]},
        "mlp": {"component": "mlp", "input": "v", "hidden": 8},
        "y": {"component": "add", "inputs": ["v", "mlp"]},
    }
    nodes = {k: v for k, v in {**nodes, **changed.pop("nodes", {})}.items() if v is not None}
    return {
        "name": "small",
        "width": 4,
        "block": {"nodes": nodes, "output": "y", **changed.pop("block", {})},
        **changed,
    }


def refused_document(document: Any) -> str:
    with pytest.raises(BadInput) as caught:
        dict(read(document).graphs)
    return str(caught.value)
