"""Every strategy and every route in numbers, on the catalogue and on random blocks."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import FIRST, MIXED, SMALL, TOLERANCE, attack, block, insist_on_plan, insist_on_result, loud, small

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.components import Component, stream
from blockkit.errors import BadInput
from blockkit.graph.graph import Graph
from blockkit.graph.sizes import Capacity
from blockkit.planner.plan import STRATEGIES, make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials import trial

# ---------------------------------------------------------------- every strategy, in numbers


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_the_catalogue_is_exact(family: str, strategy: str) -> None:
    for graph in catalog.entry(family).bound(SMALL, family).graphs.values():
        offered = offers(Planner(graph))
        assert strategy in offered
        insist_on_plan(graph, strategy)
        insist_on_plan(graph, strategy, tokens=3, per_token=True)
        capacity = offered[strategy].capacity
        for tokens in range(2, 21):
            if capacity.serves(tokens) or strategy in offers(Planner(graph), tokens):
                insist_on_plan(graph, strategy, tokens)


@pytest.mark.parametrize("family", FIRST)
def test_every_route_of_the_catalogue_is_exact(family: str) -> None:
    """Each route, not only those that a strategy prefers."""
    graph = small(family)
    for route in judge(graph).routes:
        alone = make_plan(graph, "stable")
        insist_on_result(trial.solve(trial.draw(graph, 5), replace(alone, route=route)))


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_left_out_is_noticed(family: str, strategy: str) -> None:
    plan = make_plan(small(family), strategy)
    kept = 0 if family == "vanilla" else len(plan.route.steps) - 1  # without a skip, restoring the inside is enough
    short = replace(plan, route=replace(plan.route, steps=plan.route.steps[:kept]))
    with pytest.raises(AssertionError):
        insist_on_result(trial.solve(trial.draw(plan.graph), short))


def test_a_trial_needs_numbers() -> None:
    graph = next(iter(catalog.entry("llama").architecture.graphs.values()))
    with pytest.raises(BadInput, match="d_model"):
        trial.draw(graph)
    with pytest.raises(BadInput, match="at least one token"):
        trial.draw(small("llama"), tokens=0)
    bound = graph.bound(SMALL)
    assert trial.solve(trial.draw(bound), make_plan(bound)).relative_linf < TOLERANCE


def test_a_trial_repeats() -> None:
    one, two = (trial.draw(small("gpt2"), 3, 2) for _ in range(2))
    assert all(np.array_equal(v, two.parameters[n]) for n, v in one.parameters.items())
    assert np.array_equal(one.input, two.input)
    other = trial.draw(small("gpt2"), 4, 2)
    assert not np.array_equal(one.input, other.input)


# ---------------------------------------------------------------- random blocks: a yes is a yes, a no is a no

BRANCHES: list[Callable[[Component], Component]] = [
    lambda v: bk.MLP(v, hidden=6),
    lambda v: bk.MLP(bk.RMSNorm(v), hidden=6, activation="tanh", bias=True),
    lambda v: bk.GatedMLP(bk.LayerNorm(v), hidden=6),
    lambda v: bk.RMSNorm(bk.GatedMLP(v, hidden=5), offset=1.0),
    lambda v: bk.Gain(bk.MLP(v, hidden=3, activation="leaky_relu")),
    lambda v: bk.Scale(bk.Linear(bk.Linear(v, out=6)), 0.5),
    lambda v: bk.RMSNorm(bk.Linear(v), scale=False),
    lambda v: bk.Activation(bk.Linear(v), "tanh"),
    lambda v: bk.Gain(bk.Bias(v)) * bk.Activation(bk.Linear(v), "sigmoid"),
    lambda v: bk.Softcap(bk.Bias(v), 2.0),
]
MIXERS: list[Callable[[Component], Component]] = [
    lambda u: bk.Mixer(u),
    lambda u: bk.Attention(bk.RMSNorm(u), heads=2, head_dim=2),
    lambda u: bk.RMSNorm(bk.Linear(bk.Mixer(u, out=3))),
    lambda u: bk.Activation(bk.Bias(bk.Mixer(u)), "tanh"),
]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    value: Component = stream()
    for _ in range(draw(st.integers(1, 2))):
        value = value + draw(st.sampled_from(MIXERS))(value)
        for branch in draw(st.lists(st.sampled_from(BRANCHES), max_size=2)):
            skip = draw(st.booleans())
            value = value + branch(value) if skip else branch(value)
    graph = block(value)
    names = [p.name for p in graph.parameters]
    frozen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    return graph.restricted(freeze=frozen)


@settings(max_examples=80, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_every_route_of_a_random_block_is_exact(graph: Graph, seed: int) -> None:
    for route in judge(graph).routes:
        if not route.conditional:
            plan = replace(make_plan(graph, next(iter(offers(Planner(graph))))), route=route)
            assert trial.solve(trial.draw(graph, seed), plan).relative_linf <= 1e-7, route.parameters


@settings(max_examples=80, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_every_capacity_of_a_random_block_is_met(graph: Graph, seed: int) -> None:
    """One static patch serves as many tokens as the route says."""
    for route in judge(graph).routes:
        tokens = Capacity.of(6) & route.capacity
        if not route.conditional:
            plan = replace(make_plan(graph, next(iter(offers(Planner(graph))))), route=route)
            drawn = trial.draw(graph, seed, int(tokens.estimate()))
            assert trial.solve(drawn, plan).relative_linf <= 1e-6, (route.parameters, str(tokens))


BOUNDED: list[Callable[[Component], Component]] = [
    lambda u: bk.RMSNorm(u, scale=False),
    lambda u: bk.LayerNorm(u, scale=False, bias=False),
    lambda u: bk.Activation(u, "tanh"),
    lambda u: bk.Activation(u, "relu"),
    lambda u: bk.Scale(bk.Softcap(u, 2.0), -1.5),
]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(BRANCHES), st.sampled_from(BOUNDED))
def test_every_no_for_a_random_block_survives_the_attack(
    inner: Callable[[Component], Component], last: Callable[[Component], Component]
) -> None:
    graph = block(MIXED + last(inner(MIXED)))
    assert judge(graph).patchable is False
    contexts = (loud(trial.draw(graph, seed), factor) for factor in (6.0, 30.0) for seed in range(3))
    assert any(attack(drawn, starts=2, steps=30) > 1e-3 for drawn in contexts)
