"""Specs: written back without loss, described by a JSON Schema."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from drawn_specs import architectures
from hypothesis import given, settings
from specs import VALID, document_of, read, refused_document, small

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.architecture import Architecture
from blockkit.design.spec import parse_document, to_document, write_yaml
from blockkit.graph.sizes import Size

# ---------------------------------------------------------------- round trips


def insist_on_round_trip(architecture: Architecture, folder: Path) -> None:
    document = to_document(architecture)
    assert read(document) == architecture
    assert read(json.loads(json.dumps(document))) == architecture
    write_yaml(architecture, folder / "written.yaml")
    (folder / "written.json").write_text(json.dumps(document), encoding="utf-8")
    for name in ("written.yaml", "written.json"):
        again = bk.load(folder / name)
        assert isinstance(again, Architecture)
        assert again == architecture
        assert to_document(again) == document
        assert again.graphs == architecture.graphs


@pytest.mark.parametrize("name", catalog.names())
def test_catalogue_entries_survive_writing_and_reading(name: str, tmp_path: Path) -> None:
    insist_on_round_trip(catalog.load(name), tmp_path)


def test_a_file_read_twice_gives_the_same(tmp_path: Path) -> None:
    for family in catalog.families():
        file = tmp_path / "one.json"
        file.write_text(json.dumps(document_of(family)), encoding="utf-8")
        loaded = bk.load(file)
        assert loaded == catalog.load(family)
        insist_on_round_trip(catalog.load(family), tmp_path)


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_blocks_written_in_python_survive_writing_and_reading(architecture: Architecture) -> None:
    document = to_document(architecture)
    assert read(document) == architecture
    again = read(parse_document(json.dumps(document), "spec.json")[0])
    assert again == architecture
    assert again.graphs == architecture.graphs
    VALID.validate(json.loads(json.dumps(document)))


@settings(max_examples=20, deadline=None)
@given(architectures())
def test_blocks_written_in_python_survive_yaml(architecture: Architecture) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        insist_on_round_trip(architecture, Path(folder))


def test_a_value_that_is_lost_is_noticed() -> None:
    architecture = catalog.load("gemma3")
    document = to_document(architecture)
    del document["blocks"]["local"]["nodes"]["attention"]["window"]
    assert read(document) != architecture


def test_one_block_may_be_given_without_a_name() -> None:
    architecture = read(small())
    assert list(architecture.blocks) == ["block"]
    assert architecture.graphs["block"].width == Size.of(4)


def test_a_name_is_taken_from_the_file(tmp_path: Path) -> None:
    document = small()
    del document["name"]
    (tmp_path / "mine.json").write_text(json.dumps(document), encoding="utf-8")
    loaded = bk.load(tmp_path / "mine.json")
    assert isinstance(loaded, Architecture)
    assert loaded.name == "mine"


def test_components_may_stand_in_any_order() -> None:
    nodes = dict(reversed(small()["block"]["nodes"].items()))
    turned = read(small(block={"nodes": nodes}))
    assert turned.graphs["block"].shapes == read(small()).graphs["block"].shapes
    assert bk.check(turned).patchable is True


# ---------------------------------------------------------------- the schema


def test_the_schema_is_one_and_takes_the_catalogue() -> None:
    jsonschema.Draft202012Validator.check_schema(VALID.schema)
    json.dumps(VALID.schema)
    for family in catalog.families():
        VALID.validate(document_of(family))
    for name in catalog.names():
        VALID.validate(json.loads(json.dumps(to_document(catalog.load(name)))))


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown top key": lambda d: d.update(blokc=1),
    "no block": lambda d: d.pop("block"),
    "both block and blocks": lambda d: d.update(blocks={"a": d["block"]}),
    "no output": lambda d: d["block"].pop("output"),
    "no nodes": lambda d: d["block"].pop("nodes"),
    "unknown block key": lambda d: d["block"].update(width=4),
    "unknown component": lambda d: d["block"]["nodes"]["mlp"].update(component="mpl"),
    "no component": lambda d: d["block"]["nodes"]["mlp"].pop("component"),
    "component is a list": lambda d: d["block"]["nodes"]["mlp"].update(component=["mlp"]),
    "unknown setting": lambda d: d["block"]["nodes"]["mlp"].update(hiden=3),
    "missing setting": lambda d: d["block"]["nodes"]["mlp"].pop("hidden"),
    "missing input": lambda d: d["block"]["nodes"]["mlp"].pop("input"),
    "setting of a wrong type": lambda d: d["block"]["nodes"]["mlp"].update(hidden=[8]),
    "setting that is half a number": lambda d: d["block"]["nodes"]["mlp"].update(hidden=8.5),
    "truth for a number": lambda d: d["block"]["nodes"]["attention"].update(rope={"base": None}),
    "inputs as text": lambda d: d["block"]["nodes"]["y"].update(inputs="v"),
    "nested unknown": lambda d: d["block"]["nodes"]["attention"].update(rope={"bass": 1e4}),
    "width is half a number": lambda d: d.update(width=4.5),
    "width is a list": lambda d: d.update(width=[4]),
    "context length is a list": lambda d: d.update(context_length=[4]),
    "constants are a list": lambda d: d.update(constants=[1]),
    "tied is text": lambda d: d["block"].update(tied="mlp.*"),
    "nodes are a list": lambda d: d["block"].update(nodes=[]),
    "name is a number": lambda d: d.update(name=3),
    "layers without count": lambda d: d.update(layers={"pattern": ["block"]}),
    "layers with text": lambda d: d.update(layers={"pattern": "block", "count": 2}),
    "head with a typo": lambda d: d.update(head={"tide": True}),
    "embedding without vocabulary": lambda d: d.update(embedding={}),
}


@pytest.mark.parametrize("what", WRONG)
def test_schema_and_reader_refuse_the_same(what: str) -> None:
    document = copy.deepcopy(small())
    VALID.validate(document)
    read(document)
    WRONG[what](document)
    with pytest.raises(jsonschema.ValidationError):
        VALID.validate(document)
    refused_document(document)


@pytest.mark.parametrize("document", [None, 3, "text", [], ["block"], {}])
def test_what_is_no_architecture_at_all_is_refused(document: Any) -> None:
    refused_document(document)
