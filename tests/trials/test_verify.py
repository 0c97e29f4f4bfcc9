"""`verify`: small numbers for any design, and dumps that a page of NumPy confirms, or refutes when they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import blockkit as bk
from blockkit.cli.main import main
from blockkit.design import catalog
from blockkit.design.documents import Place
from blockkit.design.raw_graph import OPS, graph_document, graph_from
from blockkit.graph.ops import FUNCTIONS
from blockkit.planner.plan import STRATEGIES
from blockkit.trials.small_sizes import COUNTS
from blockkit.trials.verify import EXACT, dump_arrays, write_dump

RECHECK = Path(__file__).parents[2] / "examples" / "recheck.py"

ODD: dict[str, Any] = {  # another program's graph: any order, fan-out, two mixers, a parameter used twice, flags
    "input": "stream",
    "output": "out",
    "width": 5,
    "parameters": {"A": {"shape": [7, 5]}, "B": {"shape": [5, 7]}, "p": {"shape": [5]}, "q": {"shape": [7]},
                   "t": {"shape": [5], "tied": True}, "f": {"shape": [5], "frozen": True}},
    "nodes": {
        "out": {"op": "add", "args": ["late", "shifted", "sum"]},
        "late": {"op": "matmul", "args": ["half", "B"]},
        "half": {"op": "activation", "fn": "leaky_relu", "args": ["wide"]},
        "wide": {"op": "matmul", "args": ["sum", "A"]},
        "shifted": {"op": "add", "args": ["scaled", "p"]},
        "scaled": {"op": "multiply", "args": ["sum", "p"]},
        "sum": {"op": "add", "args": ["stream", "first", "tilt"]},
        "tilt": {"op": "multiply", "args": ["kept", "f"]},
        "kept": {"op": "multiply", "args": ["second", "t"]},
        "second": {"op": "mix", "args": ["first", "stream", "q"], "width": 5},
        "first": {"op": "mix", "args": ["stream"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = spec_from_file_location("recheck", RECHECK)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["blockkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def written(document: Any, folder: Path) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps({"graph": document}), encoding="utf-8")
    return path


def test_the_page_knows_every_operation(page: ModuleType) -> None:
    assert page.OPERATIONS.keys() == OPS.keys() - {"mix", "opaque"}  # which have no numbers of their own
    assert page.FUNCTIONS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("family", catalog.families())
def test_every_family_is_confirmed_by_the_page(family: str, page: ModuleType, tmp_path: Path) -> None:
    found = bk.verify(family, "minimal")
    if not found.exact:
        assert not bk.check(family).patchable
        return
    assert found.relative_linf is not None and found.relative_linf <= EXACT
    assert found.unpatched_relative is not None and found.unpatched_relative > 1e-3
    write_dump(found.worst, tmp_path / "d.npz")
    assert page.main(tmp_path / "d.npz") == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_raw_graphs_of_other_programs(strategy: str, tokens: int, page: ModuleType, tmp_path: Path) -> None:
    spec = written(ODD, tmp_path)
    assert bk.check(spec).patchable is True
    found = bk.verify(spec, strategy, tokens=tokens, seed=3)
    if not found.exact:  # a vector serves one token only
        assert tokens > 1 and strategy in ("minimal", "stable", "paper")
        return
    write_dump(found.worst, tmp_path / "d.npz")
    assert page.main(tmp_path / "d.npz") == 0
    assert not {"t", "f", "q"} & set(found.parameters)


def test_a_dump_holds_what_the_readme_says() -> None:
    found = dump_arrays(bk.verify("gemma3", width=6).worst)
    graph = json.loads(str(found["graph"]))["graph"]
    names = graph["parameters"]
    mixers = {n: node["args"] for n, node in graph["nodes"].items() if node["op"] == "mix"}
    assert found.keys() == {
        "graph", "input", "output/contextual", "output/patched",
        *(f"parameter/{n}" for n in names), *(f"patched/{n}" for n in names),
        *(f"mix/{n}/matrix/{i}" for n, args in mixers.items() for i in range(len(args))),
        *(f"mix/{n}/offset/{side}" for n in mixers for side in ("contextual", "reduced")),
    }  # fmt: skip
    assert found["input"].shape == found["output/patched"].shape == (6,)
    assert all(v.dtype == np.float64 for k, v in found.items() if k != "graph")
    assert all(found[f"parameter/{n}"].shape == tuple(p["shape"]) for n, p in names.items())
    assert found["parameter/mlp.down_proj"].shape == (6, graph["parameters"]["mlp.up_proj"]["shape"][0]) != (6, 6)
    several = dump_arrays(bk.verify("gemma3", "matrix", tokens=2).worst)
    assert several["input"].shape == several["output/contextual"].shape == (2, 8)


TAMPERED = {
    "no patch": lambda d: d.update(
        {k.replace("parameter/", "patched/"): d[k] for k in d if k.startswith("parameter/")}
    ),
    "a patch that is a little off": lambda d: d["patched/mlp.down_proj"].__iadd__(1e-7),
    "another context": lambda d: d["mix/attention.heads/offset/contextual"].__iadd__(1e-6),
    "another output": lambda d: d["output/contextual"].__iadd__(1e-6),
    "another input": lambda d: d["input"].__iadd__(0.1),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_page_refutes_a_dump_that_is_wrong(what: str, page: ModuleType, tmp_path: Path) -> None:
    write_dump(bk.verify("llama").worst, tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as file:
        dump = dict(file)
    assert page.main(tmp_path / "d.npz") == 0
    TAMPERED[what](dump)
    np.savez(tmp_path / "d.npz", **dump)
    assert page.main(tmp_path / "d.npz") == 1


def test_the_page_sees_a_frozen_parameter_move(page: ModuleType, tmp_path: Path) -> None:
    dump = dump_arrays(bk.verify("llama").worst)
    graph = json.loads(str(dump["graph"]))
    graph["graph"]["parameters"]["mlp.down_proj"]["frozen"] = True
    dump["graph"] = np.asarray(json.dumps(graph))
    np.savez(tmp_path / "d.npz", **dump)  # type: ignore[arg-type]
    assert page.main(tmp_path / "d.npz") == 1


def test_the_page_is_a_command(tmp_path: Path) -> None:
    write_dump(bk.verify("gptj").worst, tmp_path / "d.npz")
    done = subprocess.run([sys.executable, str(RECHECK), "d.npz"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blockkit" not in RECHECK.read_text(encoding="utf-8").split('"""')[2]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, out, err = command(capsys, monkeypatch, "verify", "gemma3-270m", "--json", "--dump", tmp_path / "d.npz")
    found = json.loads(out)
    assert status == 0 and found["relative_linf"] <= EXACT < found["unpatched_relative"]
    assert found["conditions"] and found["blocks"][0]["block"] == "local/global" and "written" in err
    with np.load(tmp_path / "d.npz") as file:
        assert "patched/mlp.down_proj" in file
    again = json.loads(command(capsys, monkeypatch, "verify", "gemma3-270m", "--json")[1])
    other = json.loads(command(capsys, monkeypatch, "verify", "gemma3-270m", "--json", "--seed", 5)[1])
    assert again == found
    assert other["unpatched_relative"] != found["unpatched_relative"]
    status, out, err = command(capsys, monkeypatch, "verify", "gemma3", "--only", "mlp.*", "--json")
    assert status == 1 and json.loads(out)["relative_linf"] is None and "no route" in json.loads(out)["reason"]


def test_what_the_graph_command_writes_is_read_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, out, _ = command(capsys, monkeypatch, "graph", "gpt2-124m")
    (tmp_path / "raw.json").write_text(out, encoding="utf-8")
    assert graph_document(bk.load(tmp_path / "raw.json")) == json.loads(out)  # type: ignore[arg-type]
    routes = {r.parameters for r in bk.check(tmp_path / "raw.json").routes}
    assert routes == {r.parameters for r in bk.check("gpt2-124m").routes}
    status, _, err = command(capsys, monkeypatch, "graph", "gpt2", "--block", "blok")
    assert status == 2 and "allowed are block" in err


def test_a_violated_condition_is_named() -> None:
    v = bk.stream() + bk.Mixer(bk.stream())
    half = bk.Gain(bk.Activation(bk.Linear(v), "relu", name="half"), name="gain")
    found = bk.verify(bk.Block(v + half, 6), "minimal")
    assert not found.exact and found.relative_linf is None
    assert "gain.scale" in found.reason and "half" in found.conditions[0]
    with pytest.raises(bk.NotPatchable, match="nothing to recheck"):
        dump_arrays(found.worst)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama", "--width", "0"], "at least 1"),
        (["llama", "--seed", "-1"], "at least 0"),
        (["llama", "--tokens", "0"], "at least 1"),
        (["llama", "--block", "blocc"], "did you mean 'block'"),
        (["llama", "--strategy", "best"], "stable"),
        (["llama", "--only", "nothing.*"], "matches no parameter"),
        (["llama", "--dump", "."], "is a folder"),
        (["llama", "--dump", "missing/d.npz"], "cannot write into"),
        (["graph.json", "--width", "6"], "is the number 5"),
        (["big.json"], "at most 2,000,000"),
    ],
)
def test_bad_input(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(ODD, tmp_path)
    big = json.dumps({"graph": ODD}).replace("5", "5000")
    (tmp_path / "big.json").write_text(big, encoding="utf-8")
    status, out, err = command(capsys, monkeypatch, "verify", *words)
    assert status == 2 and not out and said in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.json", "graph.json"]


def test_sizes_are_chosen_where_they_are_symbols() -> None:
    def sizes(**constants: int) -> dict[str, Any]:
        spec = bk.replace_constants(bk.load("llama"), constants)  # type: ignore[arg-type]
        graph = bk.verify(spec).worst.trial.graph  # type: ignore[union-attr]
        return {n: graph.parameter[n].shape for n in ("mlp.down_proj", "attention.o_proj")}

    assert sizes(d_model=12, d_ff=20, heads=3, kv_heads=1, head_dim=4) == {
        "mlp.down_proj": (12, 20), "attention.o_proj": (12, 12),
    }  # fmt: skip
    assert sizes(d_model=12)["mlp.down_proj"][1].known > 12
    rows, columns = sizes(d_model=8192, d_ff=28672, heads=64, head_dim=128)["attention.o_proj"]
    assert rows == 8 and 8 < columns.known < 200 and columns.known % COUNTS["heads"] == 0
    with pytest.raises(bk.BadInput, match="smaller width"):
        bk.verify("llama", width=8192)


def test_a_width_made_of_symbols() -> None:
    graph = json.loads(json.dumps(ODD).replace('"width": 5', '"width": "heads*dim"').replace("[5", '["heads*dim"'))
    text = json.dumps(graph).replace(", 5]", ', "heads*dim"]')
    loaded = graph_from(json.loads(text), Place("graph"))
    assert bk.verify(loaded, width=6).exact
    with pytest.raises(bk.BadInput, match="too many symbols"):
        bk.verify(bk.Block(bk.stream() + bk.Bias(bk.Mixer(bk.stream())), width="a*b*c*d*e"))
