"""Mistakes in specs, each said with its place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from specs import refused, refused_document, small

import blockkit as bk
from blockkit.design.architecture import Architecture, Block
from blockkit.design.components import COMPONENTS, stream
from blockkit.design.spec import parse_document, read_document
from blockkit.errors import BadInput


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
