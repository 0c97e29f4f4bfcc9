"""What holds for attention of every kind: packed runs, remembered rows, positions, refusals, other backends."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import attention_checks as checks
import numpy as np
import pytest
from attention_checks import alone
from processes import SMALL_MODELS, python

from blockkit.design.architecture import Block
from blockkit.design.components import Attention, Linear, RopeSettings, stream
from blockkit.errors import BadInput
from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.packing import Packing, Past
from blockkit.graph.sizes import Size

NP = NumpyArrays()


@pytest.fixture(params=checks.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_packed_run_is_each_sequence_alone(kind: str) -> None:
    graph = checks.block_of(kind)
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(19)
    at = np.concatenate([np.arange(12), np.arange(7) + 5])
    packed = checks.run(graph, NP, parameters, x, Packing(at, (12, 7), memory=(memory, memory[:4])))
    each = [alone(graph, parameters, x[:12], at[:12], memory), alone(graph, parameters, x[12:], at[12:], memory[:4])]
    assert packed == pytest.approx(np.concatenate(each), abs=1e-13)
    mixed_up = alone(graph, parameters, x, np.arange(19), memory)
    assert np.abs(mixed_up - packed).max() > 1e-3


def test_remembered_rows_are_rows_of_the_run(kind: str) -> None:
    """The later rows of a run, when the earlier ones are remembered; in a second segment nothing is."""
    graph, first = checks.block_of(kind), 8
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(15)
    at = np.arange(15)
    (node,) = [n for n in graph.nodes if n.op.mixing]
    before = Packing(at[:first], (first,), memory=(memory,))
    signals = [a for a in node.args if a not in graph.parameter]
    rows = evaluate(graph, NP, parameters, {graph.input: x[:first]}, signals, before)
    past = {node.name: Past(tuple(rows[a] for a in signals), at[:first])}
    packing = Packing(np.concatenate([at[first:], at[:first]]), (15 - first, first), past, (memory, memory))
    found = checks.run(graph, NP, parameters, np.concatenate([x[first:], x[:first]]), packing)
    assert found[: 15 - first] == pytest.approx(alone(graph, parameters, x, at, memory)[first:], abs=1e-13)
    assert found[15 - first :] == pytest.approx(alone(graph, parameters, x[:first], at[:first], memory), abs=1e-13)


def test_only_distances_count(kind: str) -> None:
    """Shifting all positions changes nothing (but for chunks, by whole chunks); a gap does where positions count."""
    graph = checks.block_of(kind)
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(14)
    at = np.arange(14)
    found = alone(graph, parameters, x, at, memory)
    moved = alone(graph, parameters, x, at + 40, memory)
    if kind == "norm-after-rope":  # its scale is not the same for the two coordinates that turn into each other
        assert np.abs(moved - found).max() > 1e-4
    else:
        assert moved == pytest.approx(found, abs=1e-11)
    gap = alone(graph, parameters, x, at + 3 * (at > 6), memory)
    settings = checks.KINDS[kind][1]
    positional = kind.startswith("latent") or not settings.keys().isdisjoint({"rope", "alibi", "relative_bias"})
    assert bool(np.abs(gap - found).max() > 1e-4) is positional


def test_the_order_of_rows_does_not_count(kind: str) -> None:
    graph = checks.block_of(kind)
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(14)
    at = np.arange(14)
    backwards = alone(graph, parameters, x[::-1], at[::-1], memory)
    assert backwards[::-1] == pytest.approx(alone(graph, parameters, x, at, memory), abs=1e-12)


def test_who_sees_later_tokens(kind: str) -> None:
    graph = checks.block_of(kind)
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(14)
    at, other = np.arange(14), x.copy()
    other[9] += 1.0
    changed = np.abs(alone(graph, parameters, other, at, memory) - alone(graph, parameters, x, at, memory)).max(axis=1)
    (node,) = [n for n in graph.nodes if n.op.mixing]
    assert bool(changed[:9].max() > 1e-6) is node.op.sees_later is (kind in checks.BOTH_WAYS)  # type: ignore[attr-defined]
    assert changed[9] > 1e-3


def test_long_sequences_go_in_slices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = checks.block_of(kind)
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(11)
    whole = alone(graph, parameters, x, np.arange(11), memory)
    monkeypatch.setattr("blockkit.graph.mixers.scoring.MOST_SCORES", 3 * 4 * 11)
    assert alone(graph, parameters, x, np.arange(11), memory) == pytest.approx(whole, abs=1e-13)


def test_symbols_are_judged_and_numbers_asked_for_when_run(kind: str) -> None:
    """Every kind with all its sizes and numbers as constants of an architecture."""
    component, settings = checks.KINDS[kind]
    assert checks.block_of(kind) == checks.block_of(kind, constants=True), (component, settings)


def test_without_its_output_projection_it_is_what_that_reads() -> None:
    """As for gates and norms between the two: any component can follow."""
    whole = Block(Attention(stream(), name="a", heads=4, rope=RopeSettings(), value_dim=5), width=32).graph()
    heads = Attention(stream(), name="a", heads=4, rope=RopeSettings(), value_dim=5, out_proj=False)
    parts = Block(Linear(heads, "d_model", name="o"), width=32).graph({"d_model": 32})
    assert parts.shapes["a.heads"] == (Size.of(20),)
    parameters, (x, memory) = checks.parameters_of(whole), checks.signals(9)
    moved = {("o.weight" if n == "a.o_proj" else n): p for n, p in parameters.items()}
    found = alone(parts, moved, x, np.arange(9), memory)
    assert np.array_equal(found, alone(whole, parameters, x, np.arange(9), memory))


# -- memory ------------------------------------------------------------------------------------------


def test_cross_attention_asks_for_a_memory_of_its_width() -> None:
    graph = checks.block_of("cross")
    parameters, (x, memory) = checks.parameters_of(graph), checks.signals(5)
    with pytest.raises(BadInput, match=r"give `memory`.*for each of the 1 sequence"):
        checks.run(graph, NP, parameters, x, Packing(np.arange(5), (5,)))
    with pytest.raises(BadInput, match="memory has width 7; cross_attend reads 20"):
        checks.run(graph, NP, parameters, x, Packing(np.arange(5), (5,), memory=(memory[:, :7],)))


# -- settings that cannot be -------------------------------------------------------------------------

REFUSED = [
    ({"rope": {"dim": 10}}, "10 of 8 coordinates cannot be rotated"),
    ({"rope": {"dim": 3}}, "3 of 8 coordinates cannot be rotated"),
    ({"rope": {"kind": "ntk"}}, "rope.kind"),
    ({"qk_norm": {"over": "all", "scale": "per_head"}}, "for norms over a head"),
    ({"qk_norm": {"over": "all", "after_rope": True}}, "for norms over a head"),
    ({"relative_bias": {"buckets": 3}}, "multiple of 2"),
    ({"relative_bias": {"buckets": 6}, "causal": False}, "multiple of 4"),
    ({"relative_bias": {"buckets": 32, "max_distance": 16}}, "max_distance must be above 16"),
    ({"fused": True, "bias": ["q", "v"]}, "one fused matrix has a bias for all"),
    ({"kv_heads": 3}, "4 heads cannot share 3"),
    ({"alibi": "steep"}, "alibi"),
    ({"clip": -1.0}, "clip must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_setting_that_cannot_be_is_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks.KINDS, "refused", ("attention", settings))
    with pytest.raises(BadInput, match=message):
        checks.block_of("refused")


# -- on the Keras arrays -----------------------------------------------------------------------------


def test_jax_computes_the_same(tmp_path: Path) -> None:
    """In float32, compiled, two packed sequences: every kind within float32's rounding of NumPy's float64."""
    for module in ("keras", "jax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    out = python(checks.__file__, home=tmp_path, KERAS_BACKEND="jax", **SMALL_MODELS)
    found = json.loads(out.splitlines()[-1])
    print("\n", found)
    assert found.keys() == checks.KINDS.keys()
    assert max(found.values()) <= 1e-5
