# ruff: noqa: E501  (tables of cases)
"""Input that is wrong, hostile or far too large: one clear message, after bounded work, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from operations import counted
from processes import HANGS

from blockkit.cli.main import main

MOST_CALLS = 90_000_000  # some ten seconds of an idle machine
RAW: dict[str, Any] = {
    "input": "x",
    "output": "y",
    "width": 4,
    "parameters": {"W": {"shape": [4, 6]}, "U": {"shape": [6, 4]}, "b": {"shape": [4]}},
    "nodes": {
        "m": {"op": "mix", "args": ["x"]},
        "v": {"op": "add", "args": ["x", "m"]},
        "u": {"op": "matmul", "args": ["v", "U"]},
        "h": {"op": "activation", "fn": "tanh", "args": ["u"]},
        "w": {"op": "matmul", "args": ["h", "W"]},
        "y": {"op": "add", "args": ["v", "w", "b"]},
    },
}
SPEC = """\
name: mine
width: 4
block:
  nodes:
    mixed: {component: mix, input: x}
    v: {component: add, inputs: [x, mixed]}
    mlp:
      component: mlp
      input: v
      hidden: 8
    y: {component: add, inputs: [v, mlp]}
  output: y
"""
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
COMMANDS = (
    ("check",), ("check", "--json"), ("check", "--explain"), ("plan",), ("plan", "--latex"), ("verify",), ("graph",),
    ("compare", "gpt2"),
)  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockkit", *map(str, words)])
        with pytest.raises(SystemExit) as ended, counted() as work:
            main()
        assert work.calls < MOST_CALLS
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """The one message with which a spec is refused, by every command that takes one."""

    def call(spec: str | Path, commands: tuple[tuple[str, ...], ...] = (("check",),)) -> str:
        message = ""
        for command in commands:
            status, out, err = run(*command, spec)
            assert (status, out) == (2, ""), (command, out, err)
            message = one_message(err)
        return message

    return call


def one_message(err: str) -> str:
    assert err.startswith("error: ") and err.count("error: ") == 1 and err.count("\n") == 1, err
    assert "Traceback" not in err and "Commented" not in err and "ordereddict" not in err, err
    assert len(err) < 5000 and err[:-1].isprintable(), err
    return err.removeprefix("error: ")


def raw(**changed: Any) -> str:
    """A raw graph in which keys are replaced, and nodes and parameters added."""
    document = {**RAW, **{k: v for k, v in changed.items() if k not in ("nodes", "parameters")}}
    for part in ("nodes", "parameters"):
        document[part] = {**RAW[part], **changed.get(part, {})}
    return json.dumps({"graph": document})


def test_what_these_tests_spoil_is_fine(run: Run, tmp_path: Path) -> None:
    for name, text in (("s.yaml", SPEC), ("g.json", raw()), ("config.json", json.dumps(LLAMA))):
        (tmp_path / name).write_text(text)
        for command in COMMANDS:
            assert run(*command, f"hf:{name}" if name == "config.json" else name)[0] == 0, command


# -- graphs and components ---------------------------------------------------------------------------

GRAPHS: dict[str, tuple[str, list[str]]] = {
    "cycle": (raw(nodes={"v": {"op": "add", "args": ["x", "m", "w"]}}), ["cycle", "graph.nodes.v"]),
    "unused parameter": (raw(parameters={"c": {"shape": [4]}}), ["graph.parameters.c", "'c' is not used"]),
    "dangling node": (raw(nodes={"d": {"op": "scale", "alpha": 2, "args": ["v"]}}), ["graph.nodes.d", "leads nowhere"]),
    "node named as a parameter": (raw(parameters={"m": {"shape": [4]}}), ["two things are named 'm'"]),
    "node twice": (raw().replace('"m": {', '"v": {"op": "mix", "args": ["x"]}, "m": {', 1), ["'v' is given twice"]),
    "wrong width": (raw(parameters={"b": {"shape": [5]}}), ["graph.nodes.y", "[5]", "one width"]),
    "not a number": (raw(nodes={"s": {"op": "scale", "alpha": float("nan"), "args": ["v"]}}), ["nodes.s.alpha", "nan"]),
    "infinite": (raw(nodes={"h": {"op": "softcap", "cap": float("inf"), "args": ["u"]}}), ["nodes.h.cap", "inf"]),
    "size zero": (raw(parameters={"b": {"shape": [0]}}), ["parameters.b", "positive"]),
    "negative size": (raw(parameters={"b": {"shape": [-4]}}), ["parameters.b", "negative: -4"]),
    "huge size": (raw(width=10**30), ["graph.width", "too large"]),
    "more digits than can be read": (raw(width=12345).replace("12345", "9" * 5000), ["malformed JSON", "digits"]),
    "huge size as text": (raw(width="9" * 5000), ["graph.width", "not a size"]),
    "name with an escape": (raw(nodes={"\x1b[31m": {"op": "mix", "args": ["x"]}}), [r"\x1b[31m", "printable"]),
    "name with a line": (raw(nodes={"a\nforged": {"op": "mix", "args": ["x"]}}), ["a\\nforged", "printable"]),
    "name without end": (raw(nodes={"n" * 10**6: {"op": "mix", "args": ["x"]}}), ["1 to 1000"]),
    "name without letters": (raw(nodes={"": {"op": "mix", "args": ["x"]}}), ["1 to 1000"]),
    "half a character": (raw(nodes={"\ud800": {"op": "mix", "args": ["x"]}}), [r"\ud800", "printable"]),
    "argument without end": (raw(nodes={"m": {"op": "mix", "args": ["x" * 10**6]}}), ["nodes.m", "does not exist"]),
    "output is a list": (raw(output=["y"]), ["graph.output", "a list ['y']"]),
    "no graph": ('{"graph": null}', ["graph", "expected a mapping", "nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAPHS)
def test_a_graph_that_is_none(refused: Callable[..., str], tmp_path: Path, what: str) -> None:
    text, said = GRAPHS[what]
    (tmp_path / "g.json").write_text(text)
    message = refused("g.json", COMMANDS[:1] if len(text) > 10_000 else COMMANDS)
    for part in ["g.json", *said]:
        assert part in message


SPECS: dict[str, tuple[str, str, list[str]]] = {
    "cycle": ("inputs: [x, mixed]", "inputs: [x, y]", ["line", "circle through"]),
    "in a circle with itself": ("input: v", "input: mlp", ["line 7", "block.nodes.mlp", "circle"]),
    "dangling": ("    v:", "    loose: {component: bias, input: x}\n    v:", ["line 6", "nodes.loose", "leads nowhere"]),
    "one name twice": ("    v:", "    mixed: {component: bias, input: x}\n    v:", ["line 6", "duplicate key", "mixed"]),
    "a name that a part has": ("    v:", "    mlp.up_proj: {component: bias, input: x}\n    v:", ["line 6", "two things"]),
    "two keys written alike": ("    v:", "    1: {component: bias, input: x}\n    '1': {component: bias, input: x}\n    v:",
                               ["line 4", "written alike"]),
    "named as the stream": ("    v:", "    x: {component: bias, input: x}\n    v:", ["line 6", "two things", "'x'"]),
    "wrong width": ("inputs: [v, mlp]", "inputs: [v, mlp, wide]\n    wide: {component: linear, input: v, out: 5}"
                    .replace("\n", "}\n", 1)[:-1], ["line 11", "nodes.y", "one width", "[5]"]),
    "head width": ("{component: mix, input: x}", "{component: attention, input: x, heads: 3}", ["line 5", "mixed", "3 heads"]),
    "another width at the output": ("output: y", "output: wide\n  frozen: []", ["'wide'", "mixed"]),
    "unknown component": ("component: mlp", "component: mpl", ["line 7", "'mpl'", "did you mean 'mlp'", "gated_mlp"]),
    "unknown input": ("input: v", "input: vv", ["line 7", "'vv'", "there are x, mixed"]),
    "component is a list": ("component: mlp", "component: [mlp]", ["line 7", "nodes.mlp"]),
    "node is a list": ("{component: mix, input: x}", "[mix, x]", ["line 5", "nodes.mixed", "a list"]),
    "node is nothing": ("{component: mix, input: x}", "", ["line 5", "nodes.mixed", "nothing"]),
    "nodes are a list": ("block:\n", "block: [1]\nno:\n", ["line 3", "block", "a list [1]"]),
    "width is a mapping": ("width: 4", "width: {a: 1}", ["line 2", "width", "not a size"]),
    "width zero": ("width: 4", "width: 0", ["positive"]),
    "width negative": ("width: 4", "width: -4", ["line 2", "negative"]),
    "width of 31 digits": ("width: 4", f"width: {10**30}", ["line 2", "too large"]),
    "width in hexadecimal": ("width: 4", "width: 0x" + "f" * 5000, ["line 2", "too large"]),
    "width infinite": ("width: 4", "width: .inf", ["line 2", "inf", "finite"]),
    "width not a number": ("width: 4", "width: .nan", ["line 2", "nan", "finite"]),
    "hidden zero": ("hidden: 8", "hidden: 0", ["line 7", "mlp.up_proj", "positive"]),
    "hidden is true": ("hidden: 8", "hidden: true", ["hidden"]),
    "hidden is a date": ("hidden: 8", "hidden: 2020-01-01", ["line 10", "hidden"]),
    "hidden is tagged": ("hidden: 8", "hidden: !!python/object:os.system x", ["hidden"]),
    "hidden is a set": ("hidden: 8", "hidden: !!set {a, b}", ["hidden"]),
    "constants are text": ("width: 4", "width: 4\nconstants: many", ["line 3", "constants", "the text 'many'"]),
    "a constant is text": ("width: 4", "width: d\nconstants: {d: many}", ["constants.d", "many"]),
    "a constant is a list": ("width: 4", "width: d\nconstants: {d: [4]}", ["constants.d", "a list"]),
    "a constant is half": ("width: 4", "width: d\nconstants: {d: 4.5}", ["4.5"]),
    "output is a list": ("output: y", "output: [y]", ["line 12", "output", "a list ['y']"]),
    "output is nothing": ("output: y", "output:", ["line 12", "output", "nothing"]),
    "frozen is a name": ("output: y", "output: y\n  frozen: mlp", ["line 13", "expected a list", "'mlp'"]),
    "a composite of itself": ("block:", "components: {a: {input: z, nodes: {b: {component: a, input: z}}, output: b}}\nblock:",
                              ["line 3", "circle"]),
    "tabs": ("    mixed:", "\tmixed:", ["line 5, column 1", "\\t"]),
    "aliases that laugh": ("name: mine", "".join(f"c{i}: &c{i} [{f'*c{i - 1}, ' * 9 if i else 'x'}]\n" for i in range(20)),
                           ["unfold into more than"]),
    "an alias in itself": ("name: mine", "constants: &c {a: *c}", ["constants.a", "expected a number"]),
    "10,000 levels": ("name: mine", "name: " + "[" * 10_000 + "]" * 10_000, ["nested too deeply"]),
    "a line without end": ("name: mine", "name: " + "n" * 2_000_000, ["line 1", "longer than", "JSON"]),
    "too many values": ("name: mine", "note:\n" + "- a\n" * 150_000, ["more than 100,000 values", "JSON"]),
    "a comment without end": ("name: mine", "# comment\n" * 500_000, ["larger than 4 MiB", "JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("what", SPECS)
def test_a_spec_that_is_none(refused: Callable[..., str], tmp_path: Path, what: str) -> None:
    old, new, said = SPECS[what]
    assert old in SPEC
    text = SPEC.replace(old, new, 1)
    (tmp_path / "s.yaml").write_text(text)
    message = refused("s.yaml", COMMANDS[:1] if len(text) > 10_000 else COMMANDS)
    for part in ["s.yaml", *said]:
        assert part in message, message


# -- files -------------------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    (folder / "empty.yaml").touch()
    (folder / "blank.yaml").write_text("\n  \n# nothing\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "latin.yaml").write_bytes("name: größe\n".encode("latin-1"))
    (folder / "wide.yaml").write_text(SPEC, encoding="utf-16")
    (folder / "zero.yaml").write_bytes(b"name: a\x00b\n")
    (folder / "escape.yaml").write_bytes(b"name: \x1b[31m\n")
    (folder / "folder.yaml").mkdir()
    (folder / "folder").mkdir()
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "text.yaml").write_text("hello")
    (folder / "cut.json").write_text(raw()[:100])
    (folder / "deep.json").write_text('{"a": ' + "[" * 10_000 + "]" * 10_000 + "}")
    (folder / "levels.yaml").write_text("".join(" " * i + "a:\n" for i in range(10_000 // 5)))
    (folder / "two.yaml").write_text("a: 1\n---\nb: 2\n")
    (folder / "large.json").write_text('{"a": "' + "x" * (33 << 20) + '"}')
    os.mkfifo(folder / "pipe.yaml")


FILES = {
    "empty.yaml": "expected a mapping (key: value), got nothing",
    "blank.yaml": "got nothing",
    "binary.yaml": "not text (UTF-8)",
    "latin.yaml": "not text (UTF-8)",
    "wide.yaml": "not text (UTF-8)",
    "zero.yaml": "special characters are not allowed",
    "escape.yaml": "special characters are not allowed",
    "folder.yaml": "not an ordinary file",
    "folder": "is a folder; for a Hugging Face checkpoint write hf:folder",
    "loop.yaml": "loop.yaml",
    "pipe.yaml": "not an ordinary file",
    "/dev/zero": "not an ordinary file",
    "list.yaml": "got a list ['a', 'b']",
    "text.yaml": "got the text 'hello'",
    "cut.json": "line 1, column",
    "deep.json": "nested too deeply",
    "levels.yaml": "nested too deeply",
    "two.yaml": "another document",
    "large.json": "larger than 32 MiB",
    "missing.yaml": "no such file",
    "a/b": "no such file",
    "": "the spec is empty",
    "gemma3-207m": "did you mean 'gemma3-270m'",
    "\x1b[31mred": r"\x1b[31mred",
    "a\nb": r"'a\nb'",
    "n" * 5000: "name too long",
    "a\x00b": "a",
    "hf:": "config.json",
    "hf:missing": "no config.json at missing",
    "hf:folder": "no config.json at folder",
    "hf:pipe.yaml": "no config.json",
    "hf:binary.yaml": "not text",
    "hf:large.json": "larger than 32 MiB",
    "hf:deep.json": "nested too deeply",
    "hf:cut.json": "line 1, column",
    "hf:list.yaml": "list.yaml",
    "hf:empty.yaml": "empty.yaml",
}


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and links")
def test_a_file_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    make_files(tmp_path)
    for spec, said in FILES.items():
        message = refused(spec, (("check",), ("compare", "gpt2"), ("graph",)))
        assert said in message, (spec, message)


def test_a_file_that_cannot_be_read(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "s.yaml").write_text(SPEC)
    monkeypatch.setattr(Path, "open", closed)  # root, as whom CI may run, can read every file
    assert "Permission denied" in refused("s.yaml")


def test_marks_and_line_ends_of_other_systems(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbf" + SPEC.replace("\n", "\r\n").encode())
    (tmp_path / "g.json").write_bytes(b"\xef\xbb\xbf" + raw().encode())
    assert run("check", "s.yaml")[0] == run("check", "g.json")[0] == 0


def test_a_catalogue_name_is_the_catalogues_whatever_the_folder_holds(run: Run, tmp_path: Path) -> None:
    wanted = run("check", "gemma3-270m", "--json")
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gpt2").write_text("not this")
    assert run("check", "gemma3-270m", "--json") == wanted
    assert run("check", "gpt2")[0] == 0


def test_names_with_spaces_and_other_alphabets_are_fine(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ein Entwurf.yaml").write_text(SPEC.replace("mlp:", "große Schicht:").replace("mlp]", "große Schicht]"))
    status, out, _ = run("check", "ein Entwurf.yaml")
    assert status == 0 and "große Schicht.down_proj" in out


# -- Hugging Face configurations ---------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no type": ({"model_type": None}, ["model_type None", "supported are bert, ", "YAML spec"]),
    "unknown type": ({"model_type": "lama"}, ["model_type 'lama'", "llama", "YAML spec"]),
    "type is a list": ({"model_type": ["llama"]}, ["model_type ['llama']", "llama", "YAML spec"]),
    "layers are text": ({"num_hidden_layers": "many"}, ["layers", "many"]),
    "layers negative": ({"num_hidden_layers": -2}, ["layers", "-2"]),
    "layers zero": ({"num_hidden_layers": 0}, ["layers"]),
    "layers half": ({"num_hidden_layers": 2.5}, ["layers", "2.5"]),
    "width missing": ({"hidden_size": None}, ["hidden_size is missing", "d_model"]),
    "width is a list": ({"hidden_size": [16]}, ["[16]"]),
    "width is a mapping": ({"hidden_size": {"a": 1}}, ["a"]),
    "width zero": ({"hidden_size": 0}, ["positive"]),
    "width is true": ({"hidden_size": True}, ["True"]),
    "width of 31 digits": ({"hidden_size": 10**30}, ["hidden_size", "too large"]),
    "width not a number": ({"hidden_size": float("nan")}, ["hidden_size", "nan is no number"]),
    "heads zero": ({"num_attention_heads": 0}, ["heads"]),
    "heads that do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["attention", "5"]),
    "unknown activation": ({"hidden_act": "\x1b[31mswish"}, ["hidden_act", r"\x1b[31mswish"]),
    "activation is a list": ({"hidden_act": ["silu"]}, ["hidden_act", "silu"]),
    "eps is text": ({"rms_norm_eps": "small"}, ["small"]),
    "qwen3, layer types short": ({"model_type": "qwen3", "head_dim": 4, "layer_types": ["full_attention"]},
                                 ["layer_types", "1", "2"]),
    "qwen3, layer types unknown": ({"model_type": "qwen3", "head_dim": 4, "layer_types": ["full", "half"]}, ["layer_types"]),
    "qwen3, layer types text": ({"model_type": "qwen3", "head_dim": 4, "layer_types": "full_attention"}, ["layer_types"]),
    "qwen3, layer types nested": ({"model_type": "qwen3", "head_dim": 4, "layer_types": [["a"], {}]}, ["layer_types"]),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_is_wrong(refused: Callable[..., str], tmp_path: Path, what: str) -> None:
    changed, said = CONFIGS[what]
    config = {k: v for k, v in {**LLAMA, **changed}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused("hf:config.json", (("check",), ("verify",), ("compare", "gpt2")))
    for part in ["config.json", *said]:
        assert part in message, message


def test_a_billion_layers_are_only_counted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 10**9}))
    for command in COMMANDS:
        assert run(*command, "hf:config.json")[0] == 0
    assert "1000000000" in run("compare", "gpt2", "hf:config.json")[1]


# -- options -----------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "no tokens": (("check", "gpt2", "--tokens", "0"), "tokens must be at least 1"),
    "a strategy": (("plan", "gpt2", "--strategy", "best"), "unknown strategy 'best'"),
    "a glob": (("check", "gpt2", "--only", "\x1b[31m"), "matches no parameter"),
    "a long glob": (("check", "gpt2", "--only", "*a" * 5000), "matches no parameter"),
    "two forms": (("plan", "gpt2", "--latex", "--svg"), "exclude each other"),
    "verify, no tokens": (("verify", "gpt2", "--tokens", "0"), "tokens must be at least 1"),
    "verify, no width": (("verify", "gpt2", "--width", "0"), "width must be at least 1"),
    "verify, great width": (("verify", "gpt2", "--width", "1000000000000"), "width"),
    "verify, a seed": (("verify", "gpt2", "--seed", "-1"), "seed"),
    "verify, a block": (("verify", "gpt2", "--block", "none"), "no block 'none'"),
    "dump to a folder": (("verify", "gpt2", "--dump", "."), "is a folder"),
    "dump to nowhere": (("verify", "gpt2", "--dump", "missing/x.npz"), "cannot write"),
    "dump to a device": (("verify", "gpt2", "--dump", os.devnull), "not an ordinary file"),
    "dump to no name": (("verify", "gpt2", "--dump", ""), "is a folder"),
    "dump to a long name": (("verify", "gpt2", "--dump", "n" * 300), "name too long"),
    "components that are none": (("check", "gpt2", "--components", "missing.py"), "missing.py"),
    "a block of a graph": (("graph", "gpt2", "--block", "none"), "'none' is not known"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_that_is_wrong(run: Run, tmp_path: Path, what: str) -> None:
    words, said = OPTIONS[what]
    status, out, err = run(*words)
    assert (status, out) == (2, "") and said in one_message(err), err
    assert not list(tmp_path.iterdir())


# -- size --------------------------------------------------------------------------------------------

WIDE = {
    "nodes that all read one": lambda n: {f"n{i}": {"op": "add", "args": ["x", "m"]} for i in range(n)},
    "a sum of all": lambda n: {f"n{i}": {"op": "scale", "alpha": 2, "args": ["m"]} for i in range(n)},
}


@pytest.mark.parametrize("shape", WIDE)
def test_a_node_that_reads_thousands(run: Run, tmp_path: Path, shape: str) -> None:
    nodes = WIDE[shape](5_000)
    document = {"input": "x", "output": "y", "width": 4, "parameters": {"b": {"shape": [4]}},
                "nodes": {"m": {"op": "mix", "args": ["x"]}, **nodes, "y": {"op": "add", "args": [*nodes, "b"]}}}  # fmt: skip
    (tmp_path / "g.json").write_text(json.dumps({"graph": document}))
    for command in (("check",), ("check", "--freeze", "b"), ("plan",), ("compare", "gpt2"), ("graph",)):
        status, out, err = run(*command, "g.json")
        assert status in (0, 1) and (out or err)


def test_a_hundred_thousand_mistakes_are_one_message(refused: Callable[..., str], tmp_path: Path) -> None:
    nodes = {f"n{i}": {"op": "scale", "alpha": 2, "args": ["m"]} for i in range(100_000)}
    (tmp_path / "g.json").write_text(raw(nodes=nodes))
    assert "leads nowhere" in refused("g.json")
    document = {
        "width": 4,
        "block": {"nodes": {n: {"component": "bias", "input": "no"} for n in nodes}, "output": "n0"},
    }
    (tmp_path / "s.json").write_text(json.dumps(document))
    assert "'no', which does not exist" in refused("s.json")
    (tmp_path / "g.json").write_text(raw(nodes={f"n{i}": {"op": "scale", "alpha": 2, "args": [f"n{(i + 1) % 10**5}"]}
                                                for i in range(10**5)}))  # fmt: skip
    assert "the graph has a cycle: n" in refused("g.json")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from blockkit.cli.main import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory")
@pytest.mark.parametrize("text", ["[{}," + "{}," * (10 << 20) + "{}]", "{}" + " " * (30 << 20), "[" * (4 << 20)])
def test_a_gigabyte_of_memory_is_enough_to_refuse(tmp_path: Path, text: str) -> None:
    (tmp_path / "g.json").write_text('{"graph": ' + text + "}")
    call = [sys.executable, "-c", LIMITED, "check", str(tmp_path / "g.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=HANGS, env=env)
    assert done.returncode == 2, done.stderr[-2000:]
    one_message(done.stderr)
