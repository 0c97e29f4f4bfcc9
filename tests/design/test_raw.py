"""Raw graphs: read in any order, refused with the place, written back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from drawn_specs import architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from specs import read, small

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.architecture import Architecture
from blockkit.design.spec import OPS, Place, graph_document, graph_from
from blockkit.errors import BadInput
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Add, Mix
from blockkit.graph.sizes import Size
from blockkit.planner.plan import STRATEGIES

RAW: dict[str, Any] = {
    "input": "x",
    "output": "y",
    "width": 4,
    "parameters": {"W": {"shape": [4, 6]}, "U": {"shape": [6, 4]}, "b": {"shape": [4]}},
    "nodes": {
        "y": {"op": "add", "args": ["v", "w", "b"]},
        "w": {"op": "matmul", "args": ["h", "W"]},
        "h": {"op": "activation", "fn": "tanh", "args": ["u"]},
        "u": {"op": "matmul", "args": ["v", "U"]},
        "v": {"op": "add", "args": ["x", "m"]},
        "m": {"op": "mix", "args": ["x"]},
    },
}


def raw(**changed: Any) -> dict[str, Any]:
    """RAW with keys replaced, and nodes and parameters added (or, where None, taken away)."""
    document = {**copy.deepcopy(RAW), **{k: v for k, v in changed.items() if k not in ("nodes", "parameters")}}
    for part in ("nodes", "parameters"):
        merged = {**document[part], **changed.get(part, {})}
        document[part] = {k: v for k, v in merged.items() if v is not None}
    return document


def graph_of(document: Any) -> Graph:
    return graph_from(document, Place("graph"))


def test_raw_graphs_are_read_in_any_order() -> None:
    graph = graph_of(RAW)
    assert [n.name for n in graph.nodes] == ["m", "v", "u", "h", "w", "y"]
    turned = graph_of({**RAW, "nodes": dict(reversed(RAW["nodes"].items()))})
    assert set(turned.nodes) == set(graph.nodes)
    assert turned.shapes == graph.shapes
    assert graph.shapes["h"] == (Size.of(6),)


def test_raw_graphs_are_checked_and_planned(tmp_path: Path) -> None:
    files = [tmp_path / "raw.json", tmp_path / "raw.yaml"]
    files[0].write_text(json.dumps({"graph": RAW}), encoding="utf-8")
    with files[1].open("w", encoding="utf-8") as file:
        YAML().dump({"graph": RAW}, file)
    specs: list[Graph | Path] = [graph_of(RAW), *files]
    for spec in specs:
        verdict = bk.check(spec)
        assert verdict.patchable is True
        assert {r.parameters: str(r.capacity) for r in verdict.routes} == {
            ("b",): "1", ("W",): "6", ("U", "b"): "1",
        }  # fmt: skip
        assert [s.parameter for s in bk.plan(spec, "paper").steps] == ["U", "b"]
        assert [s.parameter for s in bk.plan(spec, "stable").steps] == ["b"]
        assert bk.check(spec, freeze=["b", "W"]).patchable is not True
    with pytest.raises(BadInput, match="line"):
        files[1].write_text(
            files[1].read_text(encoding="utf-8").replace("op: matmul", "op: mat_mul", 1), encoding="utf-8"
        )
        bk.check(files[1])


def test_flags_of_parameters_are_read() -> None:
    graph = graph_of(raw(parameters={"b": {"shape": [4], "tied": True}, "W": {"shape": [4, 6], "frozen": True}}))
    assert graph.parameter["b"].tied
    assert graph.parameter["W"].frozen
    assert bk.check(graph).patchable is not True


def test_symbols_are_fine_in_raw_graphs() -> None:
    graph = graph_of(
        raw(width="d", parameters={"W": {"shape": ["d", "f"]}, "U": {"shape": ["f", "d"]}, "b": {"shape": ["d"]}})
    )
    assert str(bk.check(graph, only=["W"]).capacity) == "f"
    assert graph.bound({"d": 4, "f": 6}) == graph_of(RAW)


OPERATIONS: dict[str, dict[str, Any]] = {
    "add": {"op": "add", "args": ["x", "v"]},
    "multiply": {"op": "multiply", "offset": 1.0, "args": ["x", "v"]},
    "scale": {"op": "scale", "alpha": -2, "args": ["v"]},
    "matmul": {"op": "matmul", "args": ["h", "W"]},
    "rms_norm": {"op": "rms_norm", "eps": 0.5, "args": ["v"]},
    "layer_norm": {"op": "layer_norm", "args": ["v"]},
    "activation": {"op": "activation", "fn": "gelu", "args": ["v"]},
    "softcap": {"op": "softcap", "cap": 30, "args": ["v"]},
    "softmax": {"op": "softmax", "args": ["v"]},
    "concat": {"op": "concat", "args": ["v"]},
    "slice": {"op": "slice", "start": 1, "stop": 5, "args": ["h"]},
    "top_k": {"op": "top_k", "k": 2, "scores": "sigmoid", "normalise": False, "groups": 2, "args": ["v"]},
    "repeat": {"op": "repeat", "times": 1, "args": ["v"]},
    "clamp": {"op": "clamp", "low": -1.5, "args": ["v"]},
    "mix": {"op": "mix", "width": 4, "args": ["h"]},
    "opaque": {"op": "opaque", "width": 4, "args": ["v"]},
}


def test_every_operation_is_tried() -> None:
    assert OPERATIONS.keys() == OPS.keys()


@pytest.mark.parametrize("kind", OPERATIONS)
def test_every_operation_survives_writing_and_reading(kind: str) -> None:
    graph = graph_of(raw(nodes={"z": OPERATIONS[kind], "y": {"op": "add", "args": ["v", "w", "b", "z"]}}))
    document = graph_document(graph)
    assert graph_of(json.loads(json.dumps(document))["graph"]) == graph
    assert graph_document(graph_of(document["graph"])) == document
    assert document["graph"]["nodes"]["z"]["op"] == kind


@pytest.mark.parametrize("name", ["gpt2", "llama-7b", "gemma3", "vanilla"])
def test_the_raw_graph_of_a_catalogue_block_is_judged_alike(name: str) -> None:
    architecture = catalog.load(name)
    for graph in architecture.graphs.values():
        document = json.loads(json.dumps(graph_document(graph)))
        again = graph_of(document["graph"])
        assert graph_document(again) == document
        one, two = bk.check(graph), bk.check(again)
        assert (one.patchable, one.capacity) == (two.patchable, two.capacity)
        assert [r.parameters for r in one.routes] == [r.parameters for r in two.routes]
        for strategy in STRATEGIES:
            assert bk.plan(again, strategy).route.parameters == bk.plan(graph, strategy).route.parameters


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_the_raw_graph_of_a_drawn_block_survives(architecture: Architecture) -> None:
    for graph in architecture.graphs.values():
        document = json.loads(json.dumps(graph_document(graph)))
        assert graph_document(graph_of(document["graph"])) == document


BAD_RAW: dict[str, tuple[dict[str, Any], list[str]]] = {
    "cycle": (raw(nodes={"v": {"op": "add", "args": ["x", "w"]}, "m": None}), ["cycle", "w", "v", "u", "h"]),
    "self": (raw(nodes={"v": {"op": "add", "args": ["v", "m"]}}), ["cycle", "v -> v"]),
    "dangling": (raw(nodes={"d": {"op": "scale", "alpha": 2, "args": ["v"]}}), ["'d'", "leads nowhere"]),
    "unused parameter": (raw(parameters={"c": {"shape": [4]}}), ["'c'", "not used"]),
    "unknown argument": (raw(nodes={"m": {"op": "mix", "args": ["xx"]}}), ["'m'", "'xx'"]),
    "unknown output": (raw(output="z"), ["'z'", "not a node"]),
    "output is the input": (raw(output="x"), ["'x'", "not a node"]),
    "node named as a parameter": (raw(parameters={"m": {"shape": [4]}}), ["'m'", "two things"]),
    "node named as the input": (raw(input="m"), ["'m'", "two things"]),
    "wrong width": (raw(parameters={"b": {"shape": [5]}}), ["'y'", "[5]", "[4]", "one width"]),
    "matrix that does not fit": (raw(parameters={"U": {"shape": [6, 5]}}), ["'u'", "[6, 5]", "width 4"]),
    "output of another width": (raw(output="h", nodes={"y": None, "w": None}, parameters={"W": None, "b": None}),
                                ["'h'", "width 6", "has 4"]),
    "matrix where a vector belongs": (raw(parameters={"b": {"shape": [4, 4]}}), ["'y'", "matrix", "matmul"]),
    "vector where a matrix belongs": (raw(parameters={"W": {"shape": [6]}}), ["'w'", "matmul"]),
    "three axes": (raw(parameters={"b": {"shape": [4, 1, 1]}}), ["'b'"]),
    "size zero": (raw(parameters={"U": {"shape": [0, 4]}}), ["'U'", "positive"]),
    "negative size": (raw(parameters={"U": {"shape": ["-6", 4]}}), ["-6"]),
    "unknown op": (raw(nodes={"m": {"op": "mixx", "args": ["x"]}}), ["nodes.m", "'mixx'", *OPS]),
    "op is a list": (raw(nodes={"m": {"op": ["mix"], "args": ["x"]}}), ["nodes.m", *OPS]),
    "no op": (raw(nodes={"m": {"args": ["x"]}}), ["nodes.m", *OPS]),
    "unknown key of an op": (raw(nodes={"m": {"op": "mix", "wide": 4, "args": ["x"]}}), ["'wide'", "op, args, width"]),
    "missing setting": (raw(nodes={"h": {"op": "activation", "args": ["u"]}}), ["nodes.h", "needs fn"]),
    "unknown fn": (raw(nodes={"h": {"op": "activation", "fn": "swish", "args": ["u"]}}), ["swish", "silu", "nodes.h"]),
    "fn is a list": (raw(nodes={"h": {"op": "activation", "fn": ["tanh"], "args": ["u"]}}), ["nodes.h", "tanh"]),
    "setting that is no number": (raw(nodes={"h": {"op": "softcap", "cap": "3", "args": ["u"]}}), ["nodes.h", "cap"]),
    "cap of zero": (raw(nodes={"h": {"op": "softcap", "cap": 0, "args": ["u"]}}), ["positive"]),
    "args are text": (raw(nodes={"m": {"op": "mix", "args": "x"}}), ["nodes.m", "list of names"]),
    "slice outside": (raw(nodes={"h": {"op": "slice", "start": 2, "stop": 8, "args": ["u"]}}), ["'h'", "2:8", "6"]),
    "slice at half": (raw(nodes={"h": {"op": "slice", "start": 1.5, "stop": 3, "args": ["u"]}}), ["nodes.h"]),
    "shape is a number": (raw(parameters={"b": {"shape": 4}}), ["parameters.b", "list"]),
    "shape of halves": (raw(parameters={"b": {"shape": [4.5]}}), ["parameters.b"]),
    "shape is no size": (raw(parameters={"b": {"shape": ["a b"]}}), ["parameters.b", "not a size"]),
    "no shape": (raw(parameters={"b": {}}), ["parameters.b", "shape"]),
    "unknown key of a parameter": (raw(parameters={"b": {"shape": [4], "tide": True}}), ["tide", "parameters.b"]),
    "flag is text": (raw(parameters={"b": {"shape": [4], "tied": "no"}}), ["parameters.b", "tied"]),
    "width is half a number": (raw(width=4.5), ["width"]),
    "width is nothing": (raw(width=None), ["width"]),
    "unknown key": (raw(inputs="x"), ["'inputs'", "input, output, width, parameters, nodes"]),
    "missing key": ({k: v for k, v in RAW.items() if k != "width"}, ["missing", "'width'"]),
    "nodes are a list": ({**RAW, "nodes": []}, ["nodes", "mapping"]),
    "node is text": (raw(nodes={"m": "mix"}), ["nodes.m", "mapping"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_RAW)
def test_raw_graphs_that_do_not_fit_are_refused_by_name(what: str) -> None:
    document, said = BAD_RAW[what]
    with pytest.raises(BadInput) as caught:
        graph_of(document)
    for part in said:
        assert part in str(caught.value)


def test_built_graphs_with_equal_names_are_refused() -> None:
    node = Node("y", Add(), ("x", "m"))
    with pytest.raises(BadInput, match="two things are named 'y'"):
        Graph.build("x", "y", Size.of(4), [], [Node("m", Mix(), ("x",)), node, node])
    with pytest.raises(BadInput, match="two things are named 'p'"):
        stored = Parameter("p", (Size.of(4),))
        Graph.build("x", "y", Size.of(4), [stored, stored], [Node("y", Add(), ("x", "p"))])


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(allow_nan=False), st.text(max_size=4),
              st.sampled_from(["x", "y", "m", "add", "mix", "matmul", "d", "b"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))][0 if path else 1 :]


def spoiled(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with what stands at `path` replaced."""
    found = copy.deepcopy(document)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(RAW)), JUNK)
def test_junk_in_a_raw_graph_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    try:
        bk.check(graph_of(spoiled(RAW, path, value)))
    except BadInput as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(small())), JUNK)
def test_junk_in_an_architecture_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    try:
        bk.check(read(spoiled(small(), path, value)))
    except BadInput as error:
        assert str(error)
