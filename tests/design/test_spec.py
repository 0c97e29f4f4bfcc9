"""Specs: read with places for every mistake, written back without loss, described by a JSON Schema."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.architecture import Architecture, Block
from blockkit.design.components import COMPONENTS, Component, stream
from blockkit.design.spec import (
    OPS,
    Place,
    architecture_from,
    graph_document,
    graph_from,
    parse_document,
    read_document,
    to_document,
    write_yaml,
)
from blockkit.errors import BadInput
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Add, Mix
from blockkit.graph.sizes import Size
from blockkit.planner.plan import STRATEGIES

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


NUMBERS = st.one_of(st.integers(1, 9), st.floats(0.001, 4.0), st.just("eps"))
UNARY: list[Callable[[Any, Any], Component]] = [
    lambda z, n: bk.RMSNorm(z, eps=n, offset=1.0),
    lambda z, n: bk.RMSNorm(z, scale=False),
    lambda z, n: bk.LayerNorm(z, eps=n, bias=False),
    lambda z, n: bk.Linear(z, bias=True),
    lambda z, n: bk.Linear(z, out="d_model"),
    lambda z, n: bk.Activation(z, "silu"),
    lambda z, n: bk.Softcap(z, n),
    lambda z, n: bk.Scale(z, n),
    lambda z, n: bk.Gain(z, offset=0.5),
    lambda z, n: bk.Bias(z),
    lambda z, n: bk.MLP(z, hidden="d_ff", bias=True),
    lambda z, n: bk.GatedMLP(z, hidden=7, activation="relu", name="gated"),
    lambda z, n: bk.Mixer(z),
    lambda z, n: bk.Attention(
        z, heads=3, kv_heads=1, head_dim=4, rope=bk.RopeSettings(base=n), qk_norm=bk.QKNorm(offset=1.0), window=5,
        softcap=n, scale_dim=8, bias=True, out_bias=False, causal=False,
    ),
    lambda z, n: bk.Attention(z, heads="heads", head_dim=2, fused=True),
]  # fmt: skip


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Blocks as people write them in Python, with shared parts."""
    made: list[Any] = [stream()]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.integers(0, len(UNARY) + 1))
        one, two = (made[draw(st.integers(0, len(made) - 1))] for _ in range(2))
        if kind < len(UNARY):
            built = UNARY[kind](one, draw(NUMBERS))
            built = built if not any(c.name == built.name != "" for c in made) else replace(built, name="")  # type: ignore[type-var]
        else:
            built = one + two if kind == len(UNARY) else one * two
        made.append(built)
    total = bk.Add(tuple(made))
    block = Block(total, "d_model", tied=draw(st.sampled_from([(), ("*",)])) if parameters_of(total) else ())
    constants: dict[str, Any] = draw(st.sampled_from([{}, {"d_model": 6}, {"eps": 1e-5, "d_ff": 9, "heads": 2}]))
    return Architecture(
        "drawn", "d_model", {"main": block}, constants=constants, note="a note: with # signs, and 'quotes'"
    )


def parameters_of(output: Component) -> bool:
    return bool(Block(output, "d_model").graph().parameters)


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


# ---------------------------------------------------------------- mistakes and their places


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("name: a\nblock: {nodes: [}\n", 2, 17),
        ("name: a\n\tblock: 1\n", 2, 1),
        ("name: a\nname: b\n", 2, 1),
        ("name: 'a\n", 2, 1),
        ("a: b: c\n", 1, 5),
        ("name: *nobody\n", 1, 7),
    ],
)
def test_malformed_yaml_says_where(text: str, line: int, column: int, tmp_path: Path) -> None:
    message = refused(text, tmp_path)
    found = re.search(r"line (\d+), column (\d+)", message)
    assert found, message
    assert (int(found[1]), int(found[2])) == (line, column)
    assert "spec.yaml" in message
    assert "malformed YAML" in message


def test_malformed_json_says_where(tmp_path: Path) -> None:
    message = refused('{"name": "a",\n "block": {,}}', tmp_path, "spec.json")
    assert "spec.json, line 2, column 12: malformed JSON" in message


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "a chain of aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
    "levels": "".join("  " * i + "a:\n" for i in range(1500)),
    "levels of JSON": '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}",
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_refused(what: str) -> None:
    with pytest.raises(BadInput, match=r"nested too deeply|unfold into more than"):
        parse_document(BOMBS[what], "bomb.yaml")


def test_a_key_given_twice_in_json_is_refused(tmp_path: Path) -> None:
    text = json.dumps(small()).replace('"norm": {', '"mlp": {"component": "mix", "input": "x"}, "norm": {', 1)
    assert "mlp" in refused(text, tmp_path, "spec.json")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match="not text"):
        read_document(tmp_path / "bytes.yaml")
    with pytest.raises(BadInput, match="hf:"):
        bk.load(tmp_path)
    for opening in ("[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "deep.yaml").write_text(opening, encoding="utf-8")
        with pytest.raises(BadInput):
            read_document(tmp_path / "deep.yaml")


YAML_SPEC = """\
name: mine
width: 4
block:
  nodes:
    mixed: {component: mix, input: x}
    mlp:
      component: mlp
      input: mixed
      hidden: 8
    y: {component: add, inputs: [x, mlp]}
  output: y
"""


def test_the_spec_of_these_tests_is_fine(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(YAML_SPEC, encoding="utf-8")
    assert bk.check(tmp_path / "spec.yaml").patchable is True


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("      hidden: 8", "      hiden: 8", ["line 9, column 7", "hiden", "did you mean", "hidden", "activation"]),
        ("width: 4", "widht: 4", ["line 2, column 1", "widht", "did you mean 'width'"]),
        ("component: mlp", "component: mpl", ["line 6, column 5", "'mpl'", "allowed are", *COMPONENTS]),
        ("  output: y", "  outptu: y", ["outptu", "did you mean 'output'"]),
        ("  output: y", "  output: z", ["'z'", "mlp", "mixed"]),
        ("input: mixed", "input: mixd", ["'mlp'", "'mixd'", "mixed"]),
        ("hidden: 8", "hidden: [8]", ["line 9, column 7", "hidden"]),
        ("hidden: 8", "hidden: 8 + ", ["not a size", "mlp"]),
        ("hidden: 8", "activation: swish\n      hidden: 8", ["'swish'", "leaky_relu", "mlp"]),
        ("name: mine", "name: mine\nlayers: {pattern: [blok], count: 2}", ["'blok'", "block"]),
        ("  output: y", "  output: y\n  frozen: [mpl.*]", ["'mpl.*'", "mlp.up_proj"]),
        ("  output: y", "  output: y\n  tied: [3]", ["line 12, column 3", "expected a list of names"]),
    ],
)
def test_a_mistake_names_its_place_and_what_is_allowed(old: str, new: str, said: list[str], tmp_path: Path) -> None:
    assert old in YAML_SPEC
    message = refused(YAML_SPEC.replace(old, new), tmp_path)
    for part in said:
        assert part in message


def test_unknown_catalogue_names_are_refused_with_near_ones() -> None:
    with pytest.raises(BadInput, match=r"did you mean .*gemma3-270m"):
        bk.load("gemma3-207m")
    with pytest.raises(BadInput, match="no architecture 'zzz'"):
        bk.load("zzz")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (small(nodes={"norm": {"component": "rms_norm", "input": "y"}}), ["circle"]),
        (small(nodes={"y": {"component": "add", "inputs": ["x", "y"]}}), ["circle", "'y'"]),
        (small(nodes={"loose": {"component": "bias", "input": "x"}}), ["'loose'", "leads nowhere"]),
        (small(nodes={"y": {"component": "linear", "input": "mlp", "out": 5}}), ["width 5", "4"]),
        (small(nodes={"y": {"component": "add", "inputs": ["v"]}, "mlp": None}), ["'y'", "at least 2"]),
        (small(nodes={"y": {"component": "add", "inputs": []}, "mlp": None}), ["'y'"]),
        (small(nodes={"y": {"component": "multiply", "inputs": ["v", "mlp", "x"]}}), ["'y'", "exactly 2"]),
        (small(nodes={"attention": {"component": "attention", "input": "norm", "heads": 3}}), ["attention", "3 heads"]),
        (small(nodes={"attention": {"component": "attention", "input": "norm", "heads": 0}}), ["attention"]),
        (small(nodes={"mlp": {"component": "mlp", "input": "v", "hidden": 0}}), ["mlp.up_proj"]),
        (small(width="d", constants={"d": -4}, nodes={"attention": {"component": "mix", "input": "norm"}}), ["-4"]),
        (small(width="d", constants={"d": 0}), ["norm.scale", "positive"]),
        (small(nodes={"x": {"component": "bias", "input": "x"}}), ["'x'"]),
        (small(nodes={"x": {"component": "attention", "input": "x", "heads": 2}, "norm": None, "attention": None,
                      "v": None, "mlp": None, "y": {"component": "mlp", "input": "x", "hidden": 8}}), ["'x'"]),
        (small(nodes={"mlp.hidden": {"component": "bias", "input": "x"},
                      "y": {"component": "add", "inputs": ["mlp.hidden", "mlp"]}, "v": None,
                      "mlp": {"component": "mlp", "input": "x", "hidden": 4}, "norm": None, "attention": None}),
         ["two things are named 'mlp.hidden'"]),
        (small(nodes={"v": {"component": "softcap", "input": "x", "cap": "cap"}}, constants={"cap": "three"}), ["cap"]),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit_are_refused_by_name(document: dict[str, Any], said: list[str]) -> None:
    message = refused_document(document)
    for part in said:
        assert part in message


def test_python_blocks_that_do_not_fit_are_refused() -> None:
    x = stream()
    with pytest.raises(BadInput, match="two components are named 'm'"):
        Block(bk.Bias(bk.Bias(x, name="m"), name="m"), 4)
    with pytest.raises(BadInput, match="must do something"):
        Block(x, 4)
    with pytest.raises(BadInput, match="expected another component"):
        Block(bk.Add((x, "v")), 4)
    with pytest.raises(BadInput, match="no blocks"):
        Architecture("none", 4, {})
    with pytest.raises(BadInput, match="matches no parameter"):
        bk.check(Block(x + bk.Bias(bk.Mixer(x)), 4), only=["weight"])
    with pytest.raises(BadInput, match="at least 1"):
        bk.check(Block(x + bk.Bias(bk.Mixer(x)), 4), tokens=0)
    with pytest.raises(BadInput, match="unknown strategy 'best'"):
        bk.plan(Block(x + bk.Bias(bk.Mixer(x)), 4), "best")


# ---------------------------------------------------------------- raw graphs

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
