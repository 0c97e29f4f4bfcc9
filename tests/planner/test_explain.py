"""What a person is told: derivations, the smallest change that unblocks a design, and derived controls."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import blockkit as bk
from blockkit.api import distinct_graphs
from blockkit.cli.commands import app
from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.laws import Condition, Kind, legend
from blockkit.graph.ops import Activation, Add, Concat, MatMul, Mix, Multiply, Op, RMSNorm, Scale, Softcap
from blockkit.graph.packing import Packing
from blockkit.graph.sizes import Size
from blockkit.planner import unblocking as changes_module
from blockkit.planner.explain import derivation
from blockkit.planner.unblocking import Make, edited, smallest_changes
from blockkit.planner.verdict import judge

TANH, NORM, MIX, SUM, TIMES = Activation("tanh"), RMSNorm(), Mix(), Add(), MatMul()


def raw(
    nodes: Mapping[str, tuple[Op, str]], shapes: Mapping[str, tuple[int, ...]], frozen: Iterable[str] = (),
    tied: Iterable[str] = (), width: int = 4,
) -> Graph:  # fmt: skip
    stored = [Parameter(n, tuple(map(Size.of, s)), frozen=n in frozen, tied=n in tied) for n, s in shapes.items()]
    listed = [Node(n, op, tuple(args.split())) for n, (op, args) in nodes.items()]
    return Graph.build("x", "y", Size.of(width), stored, listed)


def on_stream(tail: Mapping[str, tuple[Op, str]], shapes: Mapping[str, tuple[int, ...]], **flags: Any) -> Graph:
    """`tail` reads v, the stream after a mixing operation without parameters."""
    return raw({"a": (MIX, "x"), "v": (SUM, "x a"), **tail}, shapes, **flags)


MLP = {"h": (TIMES, "v W1"), "g": (TANH, "h"), "f": (TIMES, "g W2")}
WEIGHTS = {"W1": (8, 4), "W2": (4, 8)}
DESIGNS: dict[str, tuple[Graph, str, tuple[str, ...]]] = {
    "norm without a scale": (
        on_stream({"h": (TIMES, "v W"), "post_norm": (NORM, "h"), "y": (SUM, "v post_norm")}, {"W": (4, 4)}),
        "give post_norm a scale",
        ("post_norm",),
    ),
    "tied projection": (raw({"a": (MIX, "x"), "o": (TIMES, "a W_o"), "y": (SUM, "x o")}, {"W_o": (4, 4)}, tied=["W_o"]),
        "untie W_o", ("W_o",)),
    "frozen outer matrix": (on_stream({**MLP, "y": (SUM, "v f")}, WEIGHTS, frozen=["W2"], tied=["W1"]),
        "free W2", ("W2",)),
    "tied and frozen": (
        on_stream({**MLP, "s": (Multiply(), "f m"), "y": (SUM, "v s")}, WEIGHTS | {"m": (4,)}, frozen=["W2"],
                  tied=["m", "W1"]),
        "free W2", ("W2",),
    ),
    "everything tied": (on_stream({**MLP, "y": (SUM, "v f")}, WEIGHTS, tied=["W1", "W2"]), "untie W2", ("W2",)),
    "no parameters": (on_stream({"y": (Scale(0.5), "v")}, {}), "add a bias at the output", ()),
    "bounded output": (on_stream({**MLP, "s": (SUM, "v f"), "y": (Softcap(5.0), "s")}, WEIGHTS, tied=["W1", "W2"]),
        "untie W2", ("W2",)),
    "one of two mixers": (
        raw({"a": (MIX, "x"), "b": (MIX, "x"), "p": (TIMES, "a W1"), "q": (TIMES, "b W2"), "y": (Concat(), "p q")},
            {"W1": (2, 4), "W2": (2, 4)}, frozen=["W2"]),
        "free W2", ("W2",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DESIGNS)
def test_the_smallest_change_is_what_a_person_would_say(name: str) -> None:
    graph, expected, blocking = DESIGNS[name]
    assert judge(graph).patchable is not True
    found = smallest_changes(graph)
    assert found.found[0].text == expected
    assert found.blocking == blocking
    for change in found.found:
        assert judge(edited(graph, change.edits)).patchable is True
        for left_out in change.edits:  # no part of it would do
            rest = [e for e in change.edits if e is not left_out]
            assert judge(edited(graph, rest)).patchable is not True


TWO_OBSTACLES = on_stream({**MLP, "s": (TANH, "f"), "y": (SUM, "v s")}, WEIGHTS, frozen=["W1"], tied=["W2"])


def test_a_pair_of_changes_where_no_single_one_does() -> None:
    found = smallest_changes(TWO_OBSTACLES, tokens=3)  # a bias would serve one token only
    assert found.found[0].text == "replace tanh at s by a bijective activation (leaky_relu) and untie W2"
    assert set(found.blocking) == {"s", "W2"}
    assert found.found[0].numbers == 32 and not found.found[0].keeps_function
    assert all(len(c.edits) > 1 for c in found.found)
    assert found.found[0].verdict.capacity == 8


def test_an_activation_that_may_be_dead_is_named() -> None:
    relu = {"h": (TIMES, "v W1"), "g": (Activation("relu"), "h"), "f": (TIMES, "g W2"), "y": (SUM, "v f")}
    graph = on_stream(relu, WEIGHTS, frozen=["W1"])
    assert judge(graph).patchable is None
    found = smallest_changes(graph)
    assert "replace relu at g by a bijective activation (leaky_relu)" in [c.text for c in found.found]
    assert found.blocking == ("g",)


def test_a_parameter_used_twice_gets_a_copy() -> None:
    graph = on_stream({"h": (TIMES, "v W"), "g": (TANH, "h"), "f": (TIMES, "g W"), "y": (SUM, "v f")}, {"W": (4, 4)})
    assert judge(graph).patchable is not True
    first = smallest_changes(graph).found[0]
    assert first.text == "give the use of W at f its own parameter"
    assert (first.parameters, first.nodes, first.numbers) == (("W",), ("f",), 16)


@pytest.mark.parametrize("name", ["norm without a scale", "tied projection", "everything tied", "no parameters"])
def test_a_change_that_keeps_the_function_keeps_it(name: str) -> None:
    graph, rng = DESIGNS[name][0], np.random.default_rng(0)
    numbers = {p.name: rng.normal(size=[int(s.known or 0) for s in p.shape]) for p in graph.parameters}
    known = {"x": rng.normal(size=(3, 4)), "a": rng.normal(size=(3, 4))}
    packing = Packing(np.arange(3), (3,))

    def output(g: Graph) -> np.ndarray:
        sizes = {p.name: int(p.shape[0].known or 0) for p in g.parameters}
        fresh = {n: np.ones(size) if n.endswith("scale") else np.zeros(size) for n, size in sizes.items()}
        stored = {n: numbers.get(n.removesuffix(".own"), fresh[n]) for n in fresh}
        return np.asarray(evaluate(g, NumpyArrays(), stored, known, [g.output], packing)[g.output])

    kept = [c for c in smallest_changes(graph).found if c.keeps_function]
    assert kept
    for change in kept:
        np.testing.assert_array_equal(output(edited(graph, change.edits)), output(graph))
    dropped = [c for c in smallest_changes(graph).found if any(e.make is Make.DROP for e in c.edits)]
    assert all(np.abs(output(edited(graph, c.edits)) - output(graph)).max() > 1e-3 for c in dropped)


def test_the_search_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: dict[str, tuple[Op, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    stream = "v"
    for i in range(200):
        nodes |= {f"h{i}": (TIMES, f"{stream} W{i}"), f"t{i}": (TANH, f"h{i}"), f"s{i}": (SUM, f"{stream} t{i}")}
        shapes[f"W{i}"], stream = (4, 4), f"s{i}"
    graph = on_stream(nodes | {"y": (TANH, stream)}, shapes, tied=shapes)
    judged = []
    monkeypatch.setattr(changes_module, "judge", lambda g, tokens=None: judged.append(g) or judge(g, tokens))
    found = smallest_changes(graph, tokens=3)
    assert 0 < len(judged) <= changes_module.MOST_JUDGEMENTS
    assert "400 edits nearest to the output" in found.capped or "ended for the size" in found.capped


LLAMA_DERIVATION = """\
rule 2 of restore: steer y to its contextual value, t = y_C
  rule 2 of steer: y = v + mlp.down_proj.out is solved for mlp.down_proj.out, u -> u + (t - y)   [Lemma 8 (outer bias)]
  rule 1 of steer: mlp.down_proj.out = mlp.down_proj @ mlp.hidden is solved for mlp.down_proj, \
W' = W + (t - W z) z^T / |z|^2   [Lemma 6 (input side), Lemma 9 (outer matrix)]
  if mlp.hidden is not zero as a vector [generic]"""


def test_a_derivation_names_every_rule_and_node() -> None:
    graph = next(iter(distinct_graphs("llama").values()))
    routes = judge(graph).routes
    assert "\n".join(derivation(graph, routes[0])) == LLAMA_DERIVATION
    inner = next(r for r in routes if r.parameters == ("attention.o_proj",))
    assert derivation(graph, inner)[-1].startswith("rule 3 of restore: the context reaches y only through attention")
    for route in routes:
        text = "\n".join(derivation(graph, route))
        assert all(link.node in text for step in route.steps for link in step.path)
        assert all(str(c) in text for c in route.conditions)


def test_conditions_say_how_they_fail() -> None:
    asked = [Condition("n", "z is not zero", kind) for kind in Kind]
    assert [str(c) for c in asked] == [f"z is not zero [{tag}]" for tag in ("generic", "open", "size")]
    assert legend(asked) == [
        "[generic]: fails only on a set of measure zero",
        "[open]: fails for whole regions of contexts",
        "[size]: depends on sizes that are still symbols",
    ]
    assert legend(asked[1:2]) == ["[open]: fails for whole regions of contexts"] and legend([]) == []


@pytest.mark.parametrize("name", ["gemma3", "t5-encoder", "rwkv"])
def test_conditions_read_the_same_in_python_and_on_the_command_line(name: str) -> None:
    verdict, (_, text) = bk.check(name), run("check", name)
    assert text.startswith(str(verdict)) and str(bk.explain(name)).startswith(str(verdict))
    tags = {c.kind for route in verdict.routes for c in route.conditions}
    for shown in (text, str(bk.plan(name)) if verdict.patchable else text):
        assert all(shown.count(f"[{kind.value}]: {kind.meaning}") <= 1 for kind in Kind)
    assert all(f"[{kind.value}]: {kind.meaning}" in text for kind in tags)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_check_prints_the_smallest_change() -> None:
    code, text = run("check", "gemma3", "--only", "mlp.*")
    assert code == 1
    assert "smallest change: free post_feedforward_norm.scale   (then post_feedforward_norm.scale, for 1 token" in text
    code, text = run("check", "llama", "--explain")
    assert code == 0 and "rule 1 of steer" in text and "smallest change" not in text


def test_check_as_json_has_reasons_beside_the_answer() -> None:
    code, text = run("check", "examples/bounded.yaml", "--json")
    found = json.loads(text)
    assert code == 1 and found["patchable"] is False and found["blocking"] == ["attention.o_proj"]
    first = found["changes"][0]
    assert first["change"] == "free attention.o_proj" and first["parameters"] == ["attention.o_proj"]
    assert first["new_numbers"] == 0 and first["then"][0]["parameters"] == ["attention.o_proj"]
    code, text = run("check", "llama", "--json")
    found = json.loads(text)
    assert code == 0 and found["changes"] == [] and found["blocking"] == []
    assert found["routes"][0]["derivation"] == LLAMA_DERIVATION.split("\n")


X = bk.stream()
CONTROLS: dict[str, tuple[Any, str, str, str, str]] = {
    "Lemma 6: an MLP": (bk.MLP(X, hidden="d_ff"), "holds", "Lemmas 6 and 7", "holds", "Lemma 9"),
    "Lemma 7: a pre-norm MLP": (bk.MLP(bk.RMSNorm(X), hidden="d_ff"), "holds", "Lemmas 6 and 7", "holds", "Lemma 9"),
    "a gated MLP": (bk.GatedMLP(X, hidden="d_ff"), "holds", "Lemmas 6 and 7", "holds", "Lemma 9"),
    "Lemma 8: an outer bias": (bk.MLP(X, hidden="d_ff", bias=True), "holds", "Lemmas 6 and 7", "holds", "Lemma 8"),
    "Lemma 10: an outer scale": (bk.RMSNorm(X), "holds", "Lemma 10", "holds", "Lemma 10"),
    "no parameters": (bk.RMSNorm(X, scale=False), "no", "", "no", ""),
    "a norm that bounds the MLP": (
        bk.RMSNorm(bk.MLP(X, hidden="d_ff"), scale=False), "holds", "Lemmas 6 and 7", "no", ""),
    "a ReLU that may be dead": (
        bk.MLP(X, hidden="d_ff", activation="relu"), "holds", "Lemmas 6 and 7", "conditional", "Lemma 9"),
    "another width": (bk.Linear(X, out=7), "holds", "Lemmas 6 and 7", "holds", "Lemma 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_of_components_are_derived(name: str) -> None:
    component, restored, lemma, steered, outer = CONTROLS[name]
    found = bk.controls(component)
    assert (found.input_control.status, found.input_control.source) == (restored, lemma)
    assert (found.output_control.status, found.output_control.source) == (steered, outer)
    assert not found.mixing


def test_controls_of_a_block_and_of_what_may_not_move() -> None:
    whole = bk.load("llama").blocks["block"]  # type: ignore[union-attr]
    assert bk.controls(whole).mixing and bk.controls(whole).output_control.holds
    held = distinct_graphs("llama", freeze=["*"])
    assert bk.controls(next(iter(held.values()))).output_control.status == "no"
