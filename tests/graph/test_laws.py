"""Every law of every operation in numbers: what its condition promises holds, and the comparison can fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chains import (
    EPS,
    LEAVES,
    LINKS,
    SLOW,
    TOLERANCE,
    Builder,
    asked_for,
    chain,
    insist_on_chain,
    insist_on_target,
    solve_for,
    the_step,
    values_of,
)
from hypothesis import example, given
from hypothesis import strategies as st

import blockkit.solve.step as solving
from blockkit.errors import ConditionViolated
from blockkit.graph.changes import dense
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.laws import Action
from blockkit.graph.ops import (
    FUNCTIONS,
    Activation,
    Add,
    Argument,
    Concat,
    LayerNorm,
    MatMul,
    Mix,
    Multiply,
    Op,
    RMSNorm,
    Scale,
    Slice,
    Softcap,
    Softmax,
)
from blockkit.graph.reach import Reach
from blockkit.graph.sizes import Size
from blockkit.planner.plan import make_plan
from blockkit.planner.route import Route
from blockkit.planner.routes import Planner
from blockkit.solve.step import Operands, solve_step
from blockkit.trials import trial

# ---------------------------------------------------------------- the laws that reach everything


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("link", [*LINKS, None])
@pytest.mark.parametrize("seed", range(3))
def test_each_law_gives_the_target(leaf: str, link: str | None, seed: int) -> None:
    insist_on_chain(leaf, [] if link is None else [link], seed)


@SLOW
@given(st.sampled_from(sorted(LEAVES)), st.lists(st.sampled_from(sorted(LINKS)), max_size=4), st.integers(0, 10**6))
@example("weight", ["matmul wide", "multiply", "slice", "leaky_relu"], 0)
@example("scale", ["leaky_relu", "multiply with offset", "matmul square"], 1)
@example("bias", ["scale", "matmul wide"], 0)
def test_laws_in_a_row_give_the_target(leaf: str, links: list[str], seed: int) -> None:
    insist_on_chain(leaf, links, seed)


@SLOW
@given(st.sampled_from(sorted(LEAVES)), st.lists(st.sampled_from(sorted(LINKS)), max_size=3), st.integers(0, 10**6))
def test_each_token_may_have_a_change_of_its_own(leaf: str, links: list[str], seed: int) -> None:
    graph = chain(leaf, links)
    drawn = trial.draw(graph, seed, tokens=3)
    step, target = the_step(graph), asked_for(drawn, seed)
    run = Operands({graph.output: target}, values_of(drawn, dict(drawn.parameters)), drawn.parameters.__getitem__, EPS)
    change = solve_step(step, graph, run, per_token=True)
    assert change.per_token
    for t in range(3):
        alone = replace(drawn, input=drawn.input[t : t + 1], mixing={
            name: trial.Mixing(m.matrices, m.contextual[t : t + 1], m.reduced[t : t + 1])
            for name, m in drawn.mixing.items()
        })  # fmt: skip
        leaf_t = dense(drawn.parameters["leaf"], trial._of_token({"leaf": change}, t)["leaf"])
        parameters = {**drawn.parameters, "leaf": leaf_t}
        assert trial.relative_linf(values_of(alone, parameters)[graph.output], target[t : t + 1]) <= TOLERANCE


@pytest.mark.parametrize(("offset", "norm_first"), [(0.0, True), (0.0, False), (1.0, True)])
@pytest.mark.parametrize("seed", range(5))
def test_direction_and_scale_together_give_the_target(offset: float, norm_first: bool, seed: int) -> None:
    drawn, route = normed_block(offset, norm_first, seed)
    first, second = route.steps
    assert first.path[-2].law.action is Action.DIRECTION
    assert not first.exact
    assert second.parameter == "m"
    insist_on_target(drawn, route, asked_for(drawn, seed))


def normed_block(offset: float, norm_first: bool, seed: int) -> tuple[trial.Trial, Route]:
    """y = m * rms_norm(W z) + mixer(x), and its route of two parameters."""
    args = ("n", "m") if norm_first else ("m", "n")
    graph = Graph.build(
        "x", "y", Size.of(6), [Parameter("W", (Size.of(6), Size.of(6))), Parameter("m", (Size.of(6),))],
        [Node("h", MatMul(), ("x", "W")), Node("n", RMSNorm(), ("h",)), Node("s", Multiply(offset), args),
         Node("mixed", Mix(), ("x",)), Node("y", Add(), ("s", "mixed"))],
    )  # fmt: skip
    (route,) = [r for r in Planner(graph).routes_to("y") if len(r.steps) == 2]
    return trial.draw(graph, seed), route


# ---------------------------------------------------------------- the laws that do not


PARTIAL: dict[str, tuple[Op, Callable[[np.ndarray], bool]]] = {
    "relu": (Activation("relu"), lambda y: bool((y >= 0).all())),
    "relu2": (Activation("relu2"), lambda y: bool((y >= 0).all())),
    "quick_gelu": (Activation("quick_gelu"), lambda y: bool((y >= -0.18).all())),
    "gelu": (Activation("gelu"), lambda y: bool((y >= -0.18).all())),
    "gelu_tanh": (Activation("gelu_tanh"), lambda y: bool((y >= -0.18).all())),
    "silu": (Activation("silu"), lambda y: bool((y >= -0.279).all())),
    "tanh": (Activation("tanh"), lambda y: bool((np.abs(y) <= 1).all())),
    "sigmoid": (Activation("sigmoid"), lambda y: bool(((y >= 0) & (y <= 1)).all())),
    "softcap": (Softcap(3.0), lambda y: bool((np.abs(y) <= 3).all())),
    "softmax": (Softmax(), lambda y: bool((y >= 0).all() and np.allclose(y.sum(axis=1), 1))),
    "rms_norm": (RMSNorm(), lambda y: bool((np.mean(y**2, axis=1) <= 1 + 1e-12).all())),
    "layer_norm": (LayerNorm(), lambda y: bool(np.allclose(y.mean(axis=1), 0) and (np.mean(y**2) <= 1 + 1e-12))),
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_a_law_with_a_limit_names_it_and_is_on_no_route(kind: str) -> None:
    op, keeps = PARTIAL[kind]
    law = op.law(0, [Argument((Size.of(4),), False)])
    assert law is not None
    assert law.reach is not Reach.ALL
    assert law.limit
    builder = Builder(4)
    bounded = builder.add(op, 4, LEAVES["bias"](builder, 4))
    planner = Planner(builder.finish(bounded))
    assert list(planner.routes_to(planner.graph.output)) == []
    assert any(law.limit in o.reason and o.node == bounded for o in planner.obstructions)
    drawn = trial.draw(planner.graph, 3, tokens=50)
    parameters = {**drawn.parameters, "leaf": 10 * drawn.parameters["leaf"]}
    assert keeps(values_of(drawn, parameters)[bounded])


def test_every_function_is_bijective_or_limited() -> None:
    assert {k for k, f in FUNCTIONS.items() if not f.bijective} <= PARTIAL.keys()
    assert all(f.bijective or f.limit for f in FUNCTIONS.values())


def by_p_alone(nodes: dict[str, tuple[Op, str]], width: int, **shapes: tuple[int, ...]) -> Planner:
    """A graph over a mixing node m in which only p may move."""
    parameters = [Parameter(n, tuple(map(Size.of, shape)), frozen=n != "p") for n, shape in shapes.items()]
    listed = [Node("m", Mix(), ("x",)), *(Node(n, op, tuple(args.split())) for n, (op, args) in nodes.items())]
    return Planner(Graph.build("x", "y", Size.of(width), parameters, listed))


def test_a_tall_matrix_reaches_a_subspace_only() -> None:
    planner = by_p_alone({"h": (MatMul(), "x V"), "b": (Add(), "h p"), "u": (MatMul(), "b W"), "y": (Add(), "u m")},
                         5, V=(3, 5), p=(3,), W=(5, 3))  # fmt: skip
    assert planner.single_routes() == []
    assert any("5 rows and only 3 columns" in o.reason for o in planner.obstructions)


def test_a_tall_matrix_before_a_wide_one_is_no_obstacle() -> None:
    """What counts is the narrowest place of the whole way."""
    way = {"g": (Multiply(), "x p"), "h": (MatMul(), "g V"), "u": (MatMul(), "h W"), "y": (Add(), "u m")}
    planner = by_p_alone(way, 4, p=(4,), V=(7, 4), W=(4, 7))
    (route,) = planner.single_routes()
    plan = replace(make_plan(planner.graph, "minimal"), route=route)
    assert trial.solve(trial.draw(planner.graph, 1), plan).relative_linf < 1e-9


def test_scaling_by_zero_has_no_law() -> None:
    assert Scale(0.0).law(0, [Argument((Size.of(4),), False)]) is None


CONCATENATED = {"g": (Multiply(), "m p"), "c": (Concat(), "m g")}


def test_one_part_of_a_concatenation_does_not_reach_the_whole() -> None:
    outside = {**CONCATENATED, "y": (Slice(Size.of(2), Size.of(6)), "c")}
    planner = by_p_alone(outside, 4, p=(4,))
    assert planner.single_routes() == []
    assert any("leaves the others as they are" in o.reason for o in planner.obstructions)


@pytest.mark.parametrize("end", [(Slice(Size.of(4), Size.of(8)), "c"), (MatMul(), "c W")], ids=["slice", "wide matrix"])
def test_one_part_reaches_what_is_asked_of_it_alone(end: tuple[Op, str]) -> None:
    shapes = {"W": (4, 8)} if "W" in end[1] else {}
    planner = by_p_alone({**CONCATENATED, "y": end}, 4, p=(4,), **shapes)
    plan = make_plan(planner.graph, "minimal")
    result = trial.solve(trial.draw(planner.graph, 1), plan)
    assert result.relative_linf < 1e-9 < 1e-3 < result.unpatched_relative


def test_a_mixing_node_has_no_law() -> None:
    assert Mix().law(0, [Argument((Size.of(4),), False)]) is None


# ---------------------------------------------------------------- conditions that do not hold


def refused(drawn: trial.Trial, target: np.ndarray, route: Route | None = None) -> ConditionViolated:
    """The refusal, having checked that it changed nothing."""
    before = {name: value.copy() for name, value in drawn.parameters.items()}
    with pytest.raises(ConditionViolated) as caught:
        solve_for(drawn, route or Route((the_step(drawn.graph),), ""), target)
    assert all(np.array_equal(before[n], v) for n, v in drawn.parameters.items())
    assert np.isfinite(caught.value.size)
    for said in (caught.value.node, caught.value.parameter):
        assert said in str(caught.value)
    return caught.value


def with_parameter(drawn: trial.Trial, **changed: np.ndarray) -> trial.Trial:
    return replace(drawn, parameters={**drawn.parameters, **changed})


@pytest.mark.parametrize("leaf", ["scale", "scale first", "offset scale"])
def test_a_factor_of_exactly_zero_is_refused(leaf: str) -> None:
    drawn = trial.draw(chain(leaf, []))
    name = next(n for n in drawn.parameters if n != "leaf")
    known = drawn.parameters[name].copy()
    known[[1, 3]] = 0.0
    error = refused(with_parameter(drawn, **{name: known}), asked_for(drawn, 0))
    assert (error.node, error.parameter, error.coordinates) == (the_step(drawn.graph).path[-1].node, "leaf", (1, 3))
    assert error.size > 0


def test_a_factor_of_zero_is_fine_where_nothing_has_to_change() -> None:
    drawn = trial.draw(chain("scale", []))
    known = drawn.parameters["p0"].copy()
    known[[1, 3]] = 0.0
    drawn = with_parameter(drawn, p0=known)
    target = asked_for(drawn, 0)
    target[:, [1, 3]] = values_of(drawn, dict(drawn.parameters))[drawn.graph.output][:, [1, 3]]
    insist_on_target(drawn, Route((the_step(drawn.graph),), ""), target)
    assert np.array_equal(solve_for(drawn, Route((the_step(drawn.graph),), ""), target)["leaf"][[1, 3]],
                          drawn.parameters["leaf"][[1, 3]])  # fmt: skip


def test_a_zero_vector_before_the_weight_is_refused() -> None:
    drawn = trial.draw(chain("weight", ["add"]))
    drawn = with_parameter(drawn, p0=np.zeros_like(drawn.parameters["p0"]))
    error = refused(drawn, asked_for(drawn, 0))
    assert (error.node, error.parameter, error.coordinates) == (the_step(drawn.graph).path[-1].node, "leaf", ())
    assert "'n0' is exactly zero" in str(error)


@pytest.mark.parametrize("link", ["matmul square", "matmul wide"])
@pytest.mark.parametrize("leaf", ["bias", "weight", "scale"])
def test_a_known_matrix_of_deficient_rank_is_refused(leaf: str, link: str) -> None:
    drawn = trial.draw(chain(leaf, [link]))
    name = next(n.args[1] for n in drawn.graph.nodes if n.name == the_step(drawn.graph).path[1].node)
    known = drawn.parameters[name].copy()
    known[2] = 0.0
    error = refused(with_parameter(drawn, **{name: known}), asked_for(drawn, 0))
    assert (error.parameter, error.coordinates) == ("leaf", (2,))
    assert "full row rank" in str(error)


def test_a_target_inside_a_deficient_range_is_met() -> None:
    drawn = trial.draw(chain("bias", ["matmul square"]))
    name = next(n.args[1] for n in drawn.graph.nodes if n.name == the_step(drawn.graph).path[1].node)
    known = drawn.parameters[name].copy()
    known[2] = known[1]
    drawn = with_parameter(drawn, **{name: known})
    target = values_of(drawn, dict(drawn.parameters))[drawn.graph.output] + known @ np.arange(1.0, 5.0)
    insist_on_target(drawn, Route((the_step(drawn.graph),), ""), target)


def test_a_gate_that_closes_a_wide_matrix_is_refused() -> None:
    drawn = trial.draw(chain("bias", ["matmul wide", "multiply"]))
    gate = next(n for n in drawn.graph.nodes if isinstance(n.op, Multiply)).args[1]
    stored = drawn.graph.node[gate].args[1]
    known = drawn.parameters[stored].copy()
    known[:4] = 0.0  # 3 of 7 columns are left for 4 rows
    error = refused(with_parameter(drawn, **{stored: known}), asked_for(drawn, 0))
    assert error.parameter == "leaf"
    assert error.coordinates


def test_a_norm_of_a_zero_vector_is_refused() -> None:
    drawn, route = normed_block(0.0, True, 0)
    drawn = with_parameter(drawn, W=np.zeros_like(drawn.parameters["W"]))
    error = refused(drawn, asked_for(drawn, 0), route)
    assert (error.node, error.parameter) == ("h", "W")
    assert "exactly zero" in str(error)


# ---------------------------------------------------------------- one static value for many tokens


@pytest.mark.parametrize("links", [[], ["multiply", "add"], ["matmul wide"], ["leaky_relu"]])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_matrix_serves_as_many_tokens_as_it_has_columns(links: list[str], tokens: int) -> None:
    drawn = trial.draw(chain("weight", links), tokens, tokens)
    insist_on_target(drawn, Route((the_step(drawn.graph),), ""), asked_for(drawn, tokens))


def test_a_capacity_beyond_the_columns_is_refused() -> None:
    drawn = trial.draw(chain("weight", []), 1, 6)
    error = refused(drawn, asked_for(drawn, 1))
    assert error.parameter == "leaf"
    assert error.coordinates
    assert "rank" in str(error)


def test_dependent_tokens_are_served_only_if_they_agree() -> None:
    drawn = trial.draw(chain("weight", []), 2, 2)
    twice = replace(drawn, input=drawn.input[[0, 1, 0]], mixing={
        name: trial.Mixing(m.matrices, m.contextual[[0, 1, 0]], m.reduced[[0, 1, 0]])
        for name, m in drawn.mixing.items()
    })  # fmt: skip
    target = asked_for(drawn, 2)[[0, 1, 0]]
    insist_on_target(twice, Route((the_step(drawn.graph),), ""), target)
    target[2, 1] += 1.0
    assert refused(twice, target).coordinates == (1,)


@pytest.mark.parametrize("leaf", ["bias", "scale"])
def test_a_vector_serves_tokens_that_ask_for_the_same(leaf: str) -> None:
    drawn = trial.draw(chain(leaf, []), 3, 2)
    target = values_of(drawn, {**drawn.parameters, "leaf": drawn.parameters["leaf"] + 1.5})[drawn.graph.output]
    insist_on_target(drawn, Route((the_step(drawn.graph),), ""), target)
    target[1, 2] += 1.0
    assert refused(drawn, target).coordinates == (2,)


def test_tokens_that_ask_for_small_but_different_shifts_are_refused() -> None:
    drawn = trial.draw(chain("bias", []), 4, 2)
    small = {n: 1e-10 * v for n, v in drawn.parameters.items()}
    mixing = {n: trial.Mixing(tuple(1e-10 * w for w in m.matrices), 1e-10 * m.contextual, 1e-10 * m.reduced)
              for n, m in drawn.mixing.items()}  # fmt: skip
    refused(replace(drawn, parameters=small, mixing=mixing), asked_for(drawn, 4, 1e-10))


# ---------------------------------------------------------------- the comparison can fail


def _half(original: Any) -> Any:
    def wrong(*args: Any, **named: Any) -> Any:
        found = original(*args, **named)
        return replace(found, left=found.left * 0.5)

    return wrong


WRONG: dict[str, tuple[str, list[str], Callable[[pytest.MonkeyPatch], None]]] = {
    "weight law halved": ("weight", [], lambda m: m.setattr(solving, "_weight_change", _half(solving._weight_change))),
    "division forgotten": (
        "scale", [], lambda m: m.setattr(solving._Pull, "_divided", lambda self, node, residual, factor: residual),
    ),
    "wrong leak": ("bias", ["leaky_relu"], lambda m: m.setattr(solving, "LEAK", 0.5)),
    "slice forgotten": (
        "bias", ["slice"],
        lambda m: m.setattr(solving._Pull, "_place", lambda self, node, position: setattr(
            self, "matrix", np.pad(self._folded(), ((0, 0), (0, 2))))),
    ),
    "matrix transposed": (
        "bias", ["matmul square"],
        lambda m: m.setattr(solving._Pull, "_least_norm", lambda self, node, matrix, residual: residual @ matrix),
    ),
    "rounding far too large": (
        "bias", [], lambda m: m.setattr(solving, "rounding", lambda *args: np.asarray(1e9)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", WRONG)
def test_a_wrong_law_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf, links, spoil = WRONG[mutation]
    for seed in range(5):
        insist_on_chain(leaf, links, seed)
    spoil(monkeypatch)
    noticed = 0
    for seed in range(5):
        try:
            insist_on_chain(leaf, links, seed)
        except AssertionError:
            noticed += 1
    assert noticed >= 4
