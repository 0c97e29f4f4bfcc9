"""Every law of every operation: solving for the argument gives the target, or says which condition fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import blockkit.solve.step as solving
from blockkit.errors import ConditionViolated
from blockkit.graph.changes import Change, dense, plus
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
from blockkit.planner.route import Route, Step
from blockkit.planner.routes import Planner
from blockkit.solve import sphere
from blockkit.solve.sphere import closest_unit_rms
from blockkit.solve.step import Operands, solve_step
from blockkit.trials import trial

TOLERANCE = 1e-9
EPS = 2.0**-53
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---------------------------------------------------------------- graphs of a few operations


@dataclass
class Builder:
    """A graph in the making. Signals are known maps of the input; only `leaf` may move."""

    width: int
    leaf: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)

    def store(self, *shape: int, free: bool = False) -> str:
        name = "leaf" if free else f"p{len(self.parameters)}"
        self.parameters.append(Parameter(name, tuple(Size.of(s) for s in shape), frozen=not free))
        return name

    def add(self, op: Op, width: int, *args: str) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(name, op, args))
        self.widths[name] = width
        return name

    def signal(self, width: int) -> str:
        return self.add(MatMul(), width, "x", self.store(width, self.width))

    def finish(self, last: str) -> Graph:
        """The block `last + mixer(x)`: the leaf has to undo what the mixer brings in."""
        mixed = self.add(Mix(), self.width, "x")
        top = self.add(Add(), self.width, last, mixed)
        return Graph.build("x", top, Size.of(self.width), self.parameters, self.nodes)


LEAVES: dict[str, Callable[[Builder, int], str]] = {
    "bias": lambda b, w: b.add(Add(), w, b.signal(w), b.store(w, free=True)),
    "bias first": lambda b, w: b.add(Add(), w, b.store(w, free=True), b.signal(w), b.signal(w)),
    "weight": lambda b, w: b.add(MatMul(), w, b.signal(5), b.store(w, 5, free=True)),
    "scale": lambda b, w: b.add(Multiply(), w, b.signal(w), b.store(w, free=True)),
    "scale first": lambda b, w: b.add(Multiply(), w, b.store(w, free=True), b.signal(w)),
    "offset scale": lambda b, w: b.add(Multiply(1.0), w, b.signal(w), b.store(w, free=True)),
    "scale before offset": lambda b, w: b.add(Multiply(-0.5), w, b.store(w, free=True), b.signal(w)),
}


@dataclass(frozen=True)
class Link:
    """An operation over a value of width `w`, and the width below that gives it `w`."""

    put: Callable[[Builder, int, str], str]
    below: Callable[[int], int] = lambda w: w


LINKS: dict[str, Link] = {
    "add": Link(lambda b, w, u: b.add(Add(), w, u, b.signal(w))),
    "add last": Link(lambda b, w, u: b.add(Add(), w, b.signal(w), b.store(w), u)),
    "multiply": Link(lambda b, w, u: b.add(Multiply(), w, u, b.signal(w))),
    "multiply second": Link(lambda b, w, u: b.add(Multiply(), w, b.signal(w), u)),
    "multiply by parameter": Link(lambda b, w, u: b.add(Multiply(1.0), w, u, b.store(w))),
    "multiply with offset": Link(lambda b, w, u: b.add(Multiply(0.75), w, u, b.signal(w))),
    "multiply second with offset": Link(lambda b, w, u: b.add(Multiply(0.75), w, b.signal(w), u)),
    "scale": Link(lambda b, w, u: b.add(Scale(-2.5), w, u)),
    "matmul square": Link(lambda b, w, u: b.add(MatMul(), w, u, b.store(w, w))),
    "matmul wide": Link(lambda b, w, u: b.add(MatMul(), w, u, b.store(w, w + 3)), lambda w: w + 3),
    "slice": Link(lambda b, w, u: b.add(Slice(Size.of(1), Size.of(w + 1)), w, u), lambda w: w + 2),
    "concat of one": Link(lambda b, w, u: b.add(Concat(), w, u)),
    "identity": Link(lambda b, w, u: b.add(Activation("identity"), w, u)),
    "leaky_relu": Link(lambda b, w, u: b.add(Activation("leaky_relu"), w, u)),
}


def chain(leaf: str, links: Sequence[str], width: int = 4) -> Graph:
    """`leaf` at the bottom, then the links from the outermost one inward."""
    builder, widths = Builder(width), [width]
    for name in links:
        widths.append(LINKS[name].below(widths[-1]))
    value = LEAVES[leaf](builder, widths[-1])
    for name, w in zip(reversed(links), reversed(widths[:-1]), strict=True):
        value = LINKS[name].put(builder, w, value)
    return builder.finish(value)


def the_step(graph: Graph) -> Step:
    """The planner's only way to steer the output: one step for the leaf."""
    (route,) = list(Planner(graph).routes_to(graph.output))
    (step,) = route.steps
    assert step.parameter == "leaf"
    return step


# ---------------------------------------------------------------- the comparison


def asked_for(drawn: trial.Trial, seed: int, size: float = 1.0) -> np.ndarray:
    """Arbitrary targets, `[tokens, width]`: not only what a contextual run would ask for."""
    shape = (len(drawn.input), drawn.input.shape[1])
    return size * np.random.default_rng([seed, 7]).normal(size=shape)


def values_of(drawn: trial.Trial, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return trial.run(drawn, False, (drawn.graph.input, *drawn.graph.node), parameters)


def solve_for(drawn: trial.Trial, route: Route, target: np.ndarray) -> dict[str, np.ndarray]:
    """All parameters after the route was solved for `target` at the output, one static value for all tokens."""
    graph = drawn.graph
    wanted = {**trial.run(drawn, True, (graph.input, *graph.node)), graph.output: target}
    parameters, changes = dict(drawn.parameters), dict[str, Change]()
    for step in route.steps:
        run = Operands(wanted, values_of(drawn, parameters), lambda name: parameters[name], EPS)
        changes[step.parameter] = plus(changes.get(step.parameter), solve_step(step, graph, run, per_token=False))
        parameters[step.parameter] = dense(drawn.parameters[step.parameter], changes[step.parameter])
    return parameters


def insist_on_target(drawn: trial.Trial, route: Route, target: np.ndarray) -> None:
    """An ordinary run with the solved parameters gives the target, and without them it does not."""
    before = values_of(drawn, dict(drawn.parameters))[drawn.graph.output]
    after = values_of(drawn, solve_for(drawn, route, target))[drawn.graph.output]
    assert trial.relative_linf(before, target) > 1e-3
    assert trial.relative_linf(after, target) <= TOLERANCE


def insist_on_chain(leaf: str, links: Sequence[str], seed: int) -> None:
    graph = chain(leaf, links)
    drawn = trial.draw(graph, seed)
    insist_on_target(drawn, Route((the_step(graph),), ""), asked_for(drawn, seed))


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


# ---------------------------------------------------------------- the closest direction


def cost(m: np.ndarray, g: np.ndarray, n: np.ndarray) -> float:
    """|m' - m|^2 for m' = g / n; where both are zero the scale stays."""
    scale = np.divide(g, n, out=np.where(g == 0, np.where(n == 0, m, 0.0), np.inf), where=n != 0)
    return float(np.sum((scale - m) ** 2))


def insist_on_direction(m: np.ndarray, g: np.ndarray) -> np.ndarray:
    n = closest_unit_rms(m, g)
    assert n.shape == m.shape
    assert np.isfinite(n).all()
    assert abs(np.mean(n**2) - 1) <= 1e-12
    assert np.isfinite(cost(m, g, n))
    assert not np.any((g != 0) & (n == 0))
    return n


def insist_on_minimum(m: np.ndarray, g: np.ndarray, n: np.ndarray, seed: int) -> None:
    """No small feasible change of direction brings the scale nearer."""
    rng, best, found = np.random.default_rng(seed), cost(m, g, n), []
    moving = n != 0
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(25):
            other = np.where(moving, n * np.exp(size * rng.normal(size=len(n))), 0.0)
            found.append(cost(m, g, other / np.sqrt(np.mean(other**2))))
    assert best <= min(found) * (1 + 1e-9) + 1e-12


@SLOW
@given(st.integers(2, 24), st.floats(1.0, 30.0), st.integers(0, 10**6))
def test_the_direction_is_a_local_minimum(width: int, longer: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=width)
    short = rng.normal(size=width)
    g = m * short * longer / np.sqrt(np.mean(short**2))  # |g / m| is long enough: not the hard case
    insist_on_minimum(m, g, insist_on_direction(m, g), seed)


@SLOW
@given(st.integers(2, 24), st.integers(0, 10**6), st.sampled_from(["m", "g", "both", "negative", "tiny", "unequal"]))
def test_the_direction_with_zeros_and_signs(width: int, seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    m, g = rng.normal(size=width), 3 * rng.normal(size=width)
    some = rng.random(width) < 0.5
    some[0] = True
    match what:
        case "m":
            m[some] = 0.0
        case "g":
            g[some] = 0.0
        case "both":
            m[some], g[rng.random(width) < 0.5] = 0.0, 0.0
        case "negative":
            m = -np.abs(m)
        case "tiny":
            m[some] *= 1e-12
        case "unequal":
            m, g = m * 10.0 ** rng.integers(-6, 6, width), g * 10.0 ** rng.integers(-6, 6, width)
    n = insist_on_direction(m, g)
    moved = np.divide(g, n, out=m.copy(), where=n != 0)
    assert not np.any((m != 0) & (moved * m < 0)), "the scale keeps its sign"
    if what in ("m", "negative") and np.sum(np.divide(g, m, out=np.full(width, np.inf), where=m != 0) ** 2) > width:
        insist_on_minimum(m, g, n, seed)


def test_the_hard_case_puts_what_is_missing_where_the_scale_is_least() -> None:
    m, g = np.array([2.0, -0.1, 3.0, 1.5]), np.array([1.0, 0.05, -0.5, 0.3])
    n = insist_on_direction(m, g)
    kept = [0, 2, 3]
    assert np.allclose((g / n)[kept], m[kept])
    assert 0 < (g / n)[1] / m[1] <= 1
    assert cost(m, g, n) <= m[1] ** 2


@SLOW
@given(st.integers(2, 24), st.just(0.0) | st.floats(1e-6, 0.99), st.integers(0, 10**6))
def test_the_hard_case_costs_at_most_the_least_scale(width: int, length: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, short = rng.normal(size=width), rng.normal(size=width)
    g = m * short * length / np.sqrt(np.mean(short**2))
    n = insist_on_direction(m, g)
    assert cost(m, g, n) <= np.min(np.abs(m)) ** 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("m", "g"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]),
        ([1.0] * 8, [50.0] + [0.0] * 7),
        ([1.0], [-3.0]),
        ([1e-30, 1.0], [1e-30, 1e-30]),
        ([1e60, 1.0], [1.0, 1e60]),
    ],
)
def test_the_direction_at_the_edges(m: list[float], g: list[float]) -> None:
    with np.errstate(all="ignore"):
        insist_on_direction(np.array(m), np.array(g))


def test_the_direction_stays_put_where_it_is_already_of_unit_length() -> None:
    m = np.array([0.5, -2.0, 3.0])
    n = np.array([1.0, -1.0, 1.0])
    assert np.allclose(closest_unit_rms(m, m * n), n)


def test_a_direction_that_only_divides_is_noticed() -> None:
    """The plain way, rescaled to unit length, is no minimum: the check of minima can fail."""
    rng = np.random.default_rng(0)
    m, g = rng.normal(size=8), 5 * rng.normal(size=8)
    plain = g / m
    plain = plain / np.sqrt(np.mean(plain**2))
    with pytest.raises(AssertionError):
        insist_on_minimum(m, g, plain, 0)


def test_the_secular_equation_is_monotone() -> None:
    size, push = np.array([0.0, 1.0, 2.0]), np.array([16.0, 8.0, 0.0])
    grown = sphere._grown(size, push)
    assert np.allclose(grown**3 * (grown - size), push)
    assert (grown >= size).all()
