"""Two designs side by side."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import blockkit as bk
from blockkit.cli.commands import app
from blockkit.errors import BadInput
from blockkit.planner.plan import STRATEGIES


def test_both_sides_agree_with_check_and_plan() -> None:
    found = bk.compare("gemma3-270m", "llama-7b")
    for side, name in ((found.left, "gemma3-270m"), (found.right, "llama-7b")):
        assert side.verdict == bk.check(name) and set(side.costs) == set(STRATEGIES)
        for strategy, cost in side.costs.items():
            assert cost.block == bk.plan(name, strategy).numbers_stored
            assert side.layers is not None and cost.model == side.layers * cost.block.known  # type: ignore[operator]


def test_a_model_of_unlike_blocks_adds_up_layer_by_layer(tmp_path: Path) -> None:
    spec = tmp_path / "mixed.yaml"
    spec.write_text(
        """
name: mixed
width: 8
blocks:
  narrow:
    nodes:
      mix: {component: mix, input: x}
      mlp: {component: mlp, input: mix, hidden: 4}
      y: {component: add, inputs: [x, mlp]}
    output: y
  wide:
    nodes:
      mix: {component: mix, input: x}
      mlp: {component: mlp, input: mix, hidden: 32}
      y: {component: add, inputs: [x, mlp]}
    output: y
layers: {pattern: [narrow, narrow, wide], count: 5}
"""
    )
    cost = bk.compare(str(spec), "gpt2").left.costs["joint"]
    assert cost.block == 32 + 8  # the wide one
    assert cost.model == 4 * (4 + 8) + 1 * (32 + 8)


def test_a_glob_may_match_one_side_only() -> None:
    found = bk.compare("gemma3", "gpt2", only=["post_feedforward_norm.scale"])
    assert found.left.verdict.patchable is True and found.right.verdict.patchable is not True
    assert not found.right.costs
    with pytest.raises(BadInput, match="'zzz' matches no parameter of gemma3 or gpt2"):
        bk.compare("gemma3", "gpt2", freeze=["zzz"])


def test_the_table_and_the_json() -> None:
    result = CliRunner().invoke(app, ["compare", "examples/bounded.yaml", "llama-7b"])
    assert result.exit_code == 0
    rows = {line[:36].strip(): line[36:].split("  ") for line in result.stdout.splitlines()}
    assert [c.strip() for c in rows["patchable"] if c.strip()] == ["no", "yes"]
    assert "no route" in result.stdout and "tanh: its results stay between -1 and 1" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 150
    found = json.loads(CliRunner().invoke(app, ["compare", "gemma3", "llama-7b", "--json"]).stdout)
    left, right = found["designs"]
    assert (left["name"], left["layers"], right["layers"]) == ("gemma3", None, 32)
    assert right["strategies"]["minimal"]["numbers_stored"] == 8192
    assert left["strategies"]["minimal"]["numbers_stored_model"] is None
    assert left["routes"][0]["parameters"] == ["post_feedforward_norm.scale"]


def test_designs_without_parameters_compare() -> None:
    bare = bk.Block(bk.stream() + bk.Mixer(bk.stream(), name="mixer"), width=4).graph()
    found = bk.compare(bare, "llama", only=["mlp.*"])
    assert found.left.verdict.patchable is False and found.right.verdict.patchable
