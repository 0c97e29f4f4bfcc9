"""The paper's lemmas and theorems, derived and in numbers."""

from collections.abc import Callable

import numpy as np
import pytest
from judging import (
    MIXED,
    TOLERANCE,
    block,
    insist_on_plan,
    insist_on_result,
    insist_on_yes,
    mlp,
    outer,
    parallel,
    served,
    small,
    x,
)

import blockkit as bk
from blockkit.design.components import Component
from blockkit.graph.graph import Graph
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials import trial


def test_lemma_6_a_plain_mlp_is_input_controllable() -> None:
    graph = block(mlp(bk.Mixer(x)))
    insist_on_yes(graph, ["mlp.up_proj"], "4", tokens=(1, 4))
    plan = bk.plan(graph, "paper", only=["mlp.up_proj"])
    assert [s.parameter for s in plan.steps] == ["mlp.up_proj"]
    assert "Lemmas 6 and 7" in plan.steps[0].source
    insist_on_restored(graph, "mlp.up_proj", "mlp.hidden")


def test_lemma_7_a_pre_norm_mlp_is_input_controllable() -> None:
    graph = block(mlp(bk.RMSNorm(bk.Mixer(x))))
    insist_on_yes(graph, ["mlp.up_proj"], "4", tokens=(1, 4))
    insist_on_restored(graph, "mlp.up_proj", "mlp.hidden")


def insist_on_restored(graph: Graph, parameter: str, node: str) -> None:
    """The patched reduced run has the contextual value at an inner node, not only at the output."""
    drawn = trial.draw(graph)
    result = trial.solve(drawn, bk.plan(graph, "paper", only=[parameter]))
    wanted = trial.run(drawn, True, (node,))[node]
    assert trial.relative_linf(trial.run(drawn, False, (node,))[node], wanted) > 1e-3
    assert trial.relative_linf(trial.run(drawn, False, (node,), result.patched_parameters)[node], wanted) <= TOLERANCE


@pytest.mark.parametrize(
    ("lemma", "branch", "parameter", "capacity", "tokens"),
    [
        ("Lemma 8", lambda v: bk.Bias(bk.Activation(v, "tanh"), name="outer"), "outer.bias", "1", (1,)),
        ("Lemma 9", lambda v: bk.Linear(bk.Activation(v, "tanh"), name="outer"), "outer.weight", "4", (1, 3, 4)),
        ("Lemma 10", lambda v: bk.Gain(bk.Activation(v, "tanh"), name="outer"), "outer.scale", "1", (1,)),
        ("Lemma 10", lambda v: bk.RMSNorm(v, offset=1.0, name="outer"), "outer.scale", "1", (1,)),
    ],
)
def test_lemmas_8_9_10_outer_parameters_are_output_controllable(
    lemma: str, branch: Callable[[Component], Component], parameter: str, capacity: str, tokens: tuple[int, ...]
) -> None:
    verdict = insist_on_yes(block(outer(branch)), [parameter], capacity, tokens)
    (route,) = verdict.routes
    assert lemma in route.source
    assert lemma in route.steps[0].law.source


def test_a_parallel_block_needs_its_output_side_only() -> None:
    graph = parallel()
    verdict = judge(graph)
    assert verdict.patchable is True
    assert served(verdict) == {("mlp.down_proj",): "6", ("mlp.down_proj_bias",): "1", ("attention.o_proj",): "6"}
    for strategy in offers(Planner(graph)):
        insist_on_plan(graph, strategy)
    upstream = judge(graph.restricted(freeze=["mlp.down_proj*", "attention.o_proj"]))
    assert upstream.patchable is not True


def test_theorem_1_gate_up_then_the_post_norm_scale() -> None:
    graph = small("gemma3")
    plan = make_plan(graph, "paper")
    assert [s.parameter for s in plan.steps] == ["mlp.gate_proj", "mlp.up_proj", "post_feedforward_norm.scale"]
    assert [s.rank for s in plan.steps] == [1, 1, None]
    assert plan.route.source == "Theorems 1 and 5"
    assert str(plan.route.capacity) == "1"
    drawn = trial.draw(graph)
    result = trial.solve(drawn, plan)
    insist_on_result(result)
    nodes = ("v", "post_feedforward_norm.normed", "mlp.hidden")
    contextual, reduced = trial.run(drawn, True, nodes), trial.run(drawn, False, nodes)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        change = result.patched_parameters[name] - drawn.parameters[name]
        assert np.linalg.matrix_rank(change, tol=1e-9) == 1
    patched = trial.run(drawn, False, nodes, result.patched_parameters)
    assert trial.relative_linf(patched["mlp.hidden"], contextual["mlp.hidden"]) <= TOLERANCE
    shift = (contextual["v"] - reduced["v"]) / contextual["post_feedforward_norm.normed"]
    found = result.patched_parameters["post_feedforward_norm.scale"] - drawn.parameters["post_feedforward_norm.scale"]
    assert trial.relative_linf(found, shift[0]) <= 1e-8


@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh", "relu"])
def test_theorem_5_restores_the_inside_and_steers_the_outside(activation: str) -> None:
    graph = block(outer(lambda v: mlp(bk.RMSNorm(v), activation=activation)))
    plan = make_plan(graph, "paper")
    assert [s.parameter for s in plan.steps] == ["mlp.up_proj", "mlp.down_proj"]
    assert [s.goal for s in plan.route.steps] == ["mlp.up_proj.out", graph.output]
    assert plan.route.source == "Theorems 1 and 5"
    assert str(plan.route.capacity) == "4"
    insist_on_plan(graph, "paper")


def test_where_no_single_parameter_serves_every_argument_is_restored() -> None:
    left, right = (bk.Activation(bk.Linear(MIXED, name=n), "tanh") for n in ("left", "right"))
    graph = block(bk.Add((left, right)))
    verdict = judge(graph)
    assert verdict.patchable is True
    assert served(verdict) == {("left.weight", "right.weight"): "4"}
    insist_on_plan(graph, "paper")
