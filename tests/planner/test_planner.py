"""What the planner derives: the paper's lemmas, the expected answers, and every no backed by an attack."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.components import Component, stream
from blockkit.errors import BadInput, NotPatchable
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.laws import Kind
from blockkit.graph.ops import (
    Activation,
    Add,
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
from blockkit.graph.sizes import Capacity, Size
from blockkit.planner.plan import STRATEGIES, make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import Verdict, judge
from blockkit.trials import trial

TOLERANCE = 1e-9
SMALL = {
    "d_model": 12, "d_ff": 20, "heads": 2, "kv_heads": 1, "head_dim": 4, "scale_dim": 4, "window": 8, "layers": 2,
    "vocabulary": 30, "context_length": 64, "embedding_scale": 1.0, "rope_base": 1e4, "local_rope_base": 1e4,
    "global_rope_base": 1e6, "tied": False,
}  # fmt: skip

FIRST = ("gemma3", "gpt2", "llama", "vanilla")  # every other family: tests/test_catalogue.py


# ---------------------------------------------------------------- helpers


def small(family: str) -> Graph:
    """The first block of a catalogue family, with small sizes."""
    return next(iter(catalog.entry(family).bound(SMALL, family).graphs.values()))


def block(output: Component, width: int = 4, tied: tuple[str, ...] = (), frozen: tuple[str, ...] = ()) -> Graph:
    return bk.Block(output, width, tied=tied, frozen=frozen).graph()


def raw(
    nodes: Mapping[str, tuple[Op, str]], parameters: Mapping[str, tuple[int, ...]] | None = None, output: str = "y",
    frozen: Iterable[str] = (), width: int = 4,
) -> Graph:  # fmt: skip
    stored = [Parameter(n, tuple(Size.of(s) for s in shape), frozen=n in frozen) for n, shape in
              (parameters or {}).items()]  # fmt: skip
    listed = [Node(n, op, tuple(args.split())) for n, (op, args) in nodes.items()]
    return Graph.build("x", output, Size.of(width), stored, listed)


def served(verdict: Verdict) -> dict[tuple[str, ...], str]:
    """Capacity by route."""
    return {r.parameters: str(r.capacity) for r in verdict.routes}


def singles(verdict: Verdict) -> dict[str, str]:
    return {r.parameters[0]: str(r.capacity) for r in verdict.routes if len(r.steps) == 1}


def reasons(verdict: Verdict) -> str:
    return "; ".join(f"{o.node}: {o.reason}" for o in verdict.obstructions)


def loud(drawn: trial.Trial, factor: float) -> trial.Trial:
    """The same trial with a larger context."""
    mixing = {n: replace(m, contextual=factor * m.contextual) for n, m in drawn.mixing.items()}
    return replace(drawn, mixing=mixing)


def context_moves(drawn: trial.Trial) -> float:
    """How far the two runs are apart without a patch."""
    output = drawn.graph.output
    return trial.relative_linf(*(trial.run(drawn, c, (output,))[output] for c in (False, True)))


# ---------------------------------------------------------------- the attack


def attack(drawn: trial.Trial, starts: int = 3, steps: int = 60, seed: int = 0) -> float:
    """The least relative error that Levenberg-Marquardt finds over all free parameters, from several starts."""
    free = [p.name for p in drawn.graph.parameters if not (p.tied or p.frozen)]
    flat = np.concatenate([drawn.parameters[n].ravel() for n in free])
    rng, output = np.random.default_rng(seed), drawn.graph.output
    wanted = trial.run(drawn, True, (output,))[output]

    def error(theta: np.ndarray) -> np.ndarray:
        ends = np.cumsum([drawn.parameters[n].size for n in free])[:-1]
        parts = dict(zip(free, np.split(theta, ends), strict=True))
        moved = {n: parts[n].reshape(v.shape) if n in parts else v for n, v in drawn.parameters.items()}
        return (trial.run(drawn, False, (output,), moved)[output] - wanted).ravel()

    scale = float(np.abs(wanted).max())
    firsts = [flat, *(flat + s * rng.normal(size=flat.size) for s in np.linspace(0.5, 3, starts - 1))]
    return min(float(np.abs(error(descend(error, theta, steps))).max()) / scale for theta in firsts)


def descend(error: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, steps: int) -> np.ndarray:
    """Levenberg-Marquardt with forward differences."""
    left, damping = error(theta), 1e-2
    for _ in range(steps):
        if np.abs(left).max() < 1e-10 or damping > 1e12:
            break
        h = 1e-7
        slope = np.stack([(error(theta + h * e) - left) / h for e in np.eye(theta.size)], axis=1)
        gram = slope @ slope.T
        move = slope.T @ np.linalg.solve(gram + damping * (1e-12 + np.trace(gram)) * np.eye(len(gram)), left)
        again = error(theta - move)
        if np.sum(again**2) < np.sum(left**2):
            theta, left, damping = theta - move, again, damping / 5
        else:
            damping *= 4
    return theta


def insist_on_no(graph: Graph, *said: str, tokens: int | None = None, factor: float = 6.0) -> Verdict:
    """The verdict is no, for the reason given, and no attack gets through for some context."""
    verdict = judge(graph, tokens)
    assert verdict.patchable is False
    for part in said:
        assert part in reasons(verdict)
    assert any(attack(loud(trial.draw(graph, seed, tokens or 1), factor)) > 1e-3 for seed in range(3))
    return verdict


# ---------------------------------------------------------------- residual blocks to judge

x = stream()
MIXED = x + bk.Mixer(x)


def outer(branch: Callable[[Component], Component]) -> Component:
    """v + branch(v), with v = x + mixer(x), which has no parameters."""
    return MIXED + branch(MIXED)


def mlp(z: Component, **settings: str) -> bk.MLP:
    return bk.MLP(z, hidden=6, name="mlp", **settings)  # type: ignore[arg-type]


def insist_on_yes(graph: Graph, only: Iterable[str], capacity: str, tokens: Iterable[int] = (1,)) -> Verdict:
    """Patchable by those parameters alone, for as many tokens, and the numbers agree."""
    restricted = graph.restricted(only)
    verdict = judge(restricted)
    assert verdict.patchable is True
    assert str(verdict.capacity) == capacity
    for count in tokens:
        for strategy in offers(Planner(restricted), count):
            insist_on_plan(restricted, strategy, count)
    return verdict


def insist_on_plan(graph: Graph, strategy: str, tokens: int = 1, per_token: bool = False) -> None:
    for seed in range(3):
        plan = make_plan(graph, strategy, None if per_token else tokens)
        insist_on_result(trial.solve(trial.draw(graph, seed, tokens), plan, per_token))


def insist_on_result(result: trial.Result) -> None:
    assert result.unpatched_relative > 1e-3
    assert result.relative_linf <= TOLERANCE


# ---------------------------------------------------------------- the paper's lemmas


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


def parallel() -> Graph:
    h = bk.LayerNorm(x, name="norm")
    return block(x + bk.Attention(h, heads=2, head_dim=3, name="attention") + mlp(h, bias=True), 5)  # type: ignore[arg-type]


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


# ---------------------------------------------------------------- the expected answers


def test_llama_like_blocks() -> None:
    graph = small("llama")
    found = singles(judge(graph))
    assert found == {"mlp.down_proj": "20", "mlp.up_proj": "12", "attention.o_proj": "8"}
    alone = judge(graph.restricted(["mlp.gate_proj"]))
    assert alone.patchable is not True
    assert "silu" in reasons(alone)


def test_gpt2_blocks() -> None:
    graph = small("gpt2")
    found = singles(judge(graph))
    assert found == {"mlp.down_proj": "20", "mlp.down_proj_bias": "1", "attention.o_proj": "8",
                     "attention.o_proj_bias": "1"}  # fmt: skip
    for alone in (["mlp.up_proj"], ["mlp.up_proj_bias"], ["mlp.up_proj", "mlp.up_proj_bias"]):
        verdict = judge(graph.restricted(alone))
        assert verdict.patchable is not True
        assert "gelu_tanh" in reasons(verdict)


def test_gemma_3_blocks() -> None:
    graph = small("gemma3")
    assert singles(judge(graph)) == {
        "post_feedforward_norm.scale": "1", "post_attention_norm.scale": "1", "attention.o_proj": "8",
    }  # fmt: skip
    alone = insist_on_no(graph.restricted(["mlp.down_proj"]), "mean(y^2)")
    assert "post_feedforward_norm.normed" in {o.node for o in alone.obstructions}


SYMBOLIC = {
    "gemma3": {"post_feedforward_norm.scale": "1", "post_attention_norm.scale": "1",
               "attention.o_proj": "head_dim*heads"},
    "llama": {"mlp.down_proj": "d_ff", "mlp.up_proj": "d_model", "attention.o_proj": "head_dim*heads"},
    "gpt2": {"mlp.down_proj": "d_ff", "mlp.down_proj_bias": "1", "attention.o_proj": "head_dim*heads",
             "attention.o_proj_bias": "1"},
}  # fmt: skip


@pytest.mark.parametrize("family", SYMBOLIC)
def test_answers_before_the_sizes_are_chosen(family: str) -> None:
    verdict = bk.check(family)
    assert verdict.patchable is True
    assert singles(verdict) == SYMBOLIC[family]


@pytest.mark.parametrize("family", ["albert", "universal-transformer", "llama", "gpt2", "gemma3", "mamba", "mixtral"])
def test_where_nothing_may_move_the_answer_is_no_before_sizes_are_chosen(family: str) -> None:
    assert bk.check(family, freeze=["*"]).patchable is False


def test_a_symbolic_size_that_decides_is_a_condition() -> None:
    verdict = bk.check("llama", only=["mlp.up_proj"])
    assert verdict.patchable is None
    assert [c.text for r in verdict.routes for c in r.conditions if c.kind is Kind.SIZE] == ["d_model <= d_ff"]
    assert "d_model <= d_ff" in reasons(verdict)
    assert bk.check("llama-7b", only=["mlp.up_proj"]).patchable is True


def test_a_hidden_layer_that_is_too_narrow_stops_the_first_matrix() -> None:
    narrow = block(outer(lambda v: bk.GatedMLP(v, hidden=3, name="mlp")))
    verdict = judge(narrow.restricted(["mlp.up_proj"]))
    assert verdict.patchable is False
    assert "4 rows and only 3 columns" in reasons(verdict)
    insist_on_no(narrow.restricted(["mlp.up_proj"]))


def test_symbolic_verdicts_hold_for_the_variants() -> None:
    for family in SYMBOLIC:
        constants = next(iter(catalog.entry(family).variants.values()))
        for parameter, text in singles(bk.check(family)).items():
            name = f"{family}-{next(iter(catalog.entry(family).variants))}"
            assert singles(bk.check(name))[parameter] == str(Size.of(text).bind(constants))


def test_attention_alone_is_patchable_by_its_output_projection() -> None:
    graph = block(x + bk.Attention(x, heads=2, head_dim=3, name="attention"))
    assert served(judge(graph)) == {("attention.o_proj",): "6"}
    insist_on_plan(graph, "joint", 6)


def test_a_bijective_activation_lets_the_first_matrix_serve() -> None:
    for activation, answer in (("leaky_relu", True), ("identity", True), ("gelu", None)):
        graph = block(outer(lambda v, a=activation: mlp(v, activation=a)))  # type: ignore[misc]
        verdict = judge(graph.restricted(["mlp.up_proj"]))
        assert verdict.patchable is answer
        if answer:
            insist_on_yes(graph, ["mlp.up_proj"], "4", tokens=(1, 4))


def test_a_layer_scale_over_the_mlp_keeps_every_route() -> None:
    graph = block(outer(lambda v: bk.Gain(bk.GatedMLP(v, hidden=6, name="mlp"), name="gain")))
    assert singles(judge(graph)) == {"gain.scale": "1", "mlp.down_proj": "6", "mlp.up_proj": "4"}
    insist_on_yes(graph, ["mlp.up_proj"], "4", tokens=(1, 4))
    insist_on_yes(graph, ["mlp.down_proj"], "6", tokens=(1, 6))


# ---------------------------------------------------------------- no, with the right reason


NO: dict[str, tuple[Graph, tuple[str, ...]]] = {
    "parameter-free post-norm": (
        block(outer(lambda v: bk.RMSNorm(mlp(bk.RMSNorm(v)), scale=False, name="post"))), ("post", "mean(y^2)"),
    ),
    "parameter-free layer norm": (
        block(outer(lambda v: bk.LayerNorm(mlp(v), scale=False, bias=False, name="post"))), ("post", "mean(y) = 0"),
    ),
    "tanh onto the residual stream": (
        block(outer(lambda v: bk.Activation(mlp(v), "tanh", name="last"))), ("tanh", "last"),
    ),
    "softcap onto the residual stream": (
        block(outer(lambda v: bk.Softcap(mlp(v), 2.0, name="last"))), ("last", "-2 and 2"),
    ),
    "softmax onto the residual stream": (
        raw({"m": (Mix(), "x"), "w": (MatMul(), "m W"), "s": (Softmax(), "w"), "y": (Add(), "x m s")}, {"W": (4, 4)}),
        ("sum to 1",),
    ),
    "relu onto the residual stream": (
        block(outer(lambda v: bk.Activation(mlp(v), "relu", name="last"))), ("never negative", "last"),
    ),
    "relu and a negative scale": (
        block(outer(lambda v: bk.Scale(bk.Activation(mlp(v), "relu"), -2.0))), ("never negative",),
    ),
    "a subspace": (
        raw({"m": (Mix(), "x"), "w": (MatMul(), "m W"), "u": (MatMul(), "w U"), "y": (Add(), "x m u")},
            {"W": (3, 4), "U": (4, 3)}, frozen=["U"]), ("4 rows and only 3 columns",),
    ),
    "all tied": (block(outer(lambda v: mlp(v)), tied=("*",)), ("mlp.down_proj is tied", "outside this block")),
    "all frozen": (
        block(outer(lambda v: mlp(v)), frozen=("mlp.*",)), ("mlp.down_proj is frozen", "freeing it would help"),
    ),
    "no parameters": (raw({"m": (Mix(), "x"), "y": (Add(), "x m")}), ("looks at other tokens",)),
    "outer frozen behind a norm": (
        block(outer(lambda v: bk.RMSNorm(mlp(v), name="post")), frozen=("post.scale",)),
        ("post", "post.scale is frozen"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO)
def test_no_with_its_reason_and_an_attack_that_fails(name: str) -> None:
    graph, said = NO[name]
    if all(p.tied or p.frozen for p in graph.parameters):
        verdict = judge(graph)
        assert verdict.patchable is False
        assert all(part in reasons(verdict) for part in said)
        assert context_moves(trial.draw(graph)) > 1e-3
    else:
        insist_on_no(graph, *said)


@pytest.mark.parametrize(
    "graph",
    [
        block(outer(lambda v: bk.RMSNorm(mlp(v), name="post"))),
        block(outer(lambda v: mlp(bk.RMSNorm(v)))).restricted(["mlp.down_proj"]),
        block(outer(lambda v: bk.GatedMLP(v, hidden=6, name="mlp"))).restricted(["mlp.up_proj"]),
        block(outer(lambda v: bk.Bias(bk.Activation(mlp(v), "tanh")))).restricted(["bias.bias"]),
        raw({"m": (Mix(), "x"), "s": (Multiply(), "m p"), "t": (Activation("tanh"), "s"), "y": (Scale(2.0), "t")},
            {"p": (4,)}),
    ],
)  # fmt: skip
def test_the_attack_succeeds_on_patchable_blocks(graph: Graph) -> None:
    assert judge(graph).patchable is True
    for seed in range(3):
        drawn = trial.draw(graph, seed)
        assert context_moves(drawn) > 1e-3
        assert attack(loud(drawn, 2.0)) < 1e-6


@pytest.mark.parametrize(
    ("graph", "tokens"),
    [
        (block(outer(lambda v: bk.Bias(v, name="outer"))), 2),
        (block(outer(lambda v: bk.Gain(v, name="outer"))), 2),
        (block(outer(lambda v: bk.Linear(v, name="outer"))), 5),
        (block(outer(lambda v: mlp(v))).restricted(["mlp.down_proj"]), 7),
    ],
)
def test_a_capacity_that_is_exceeded_is_a_no(graph: Graph, tokens: int) -> None:
    assert judge(graph, tokens - 1).patchable is True
    verdict = insist_on_no(graph, f"serves {tokens - 1} token(s), {tokens} are asked for", tokens=tokens, factor=1.0)
    assert verdict.capacity.sizes == (Size.of(0),)
    assert attack(trial.draw(graph, 0, tokens - 1)) < 1e-6
    with pytest.raises(NotPatchable, match=f"{tokens} tokens"):
        make_plan(graph, "joint", tokens)


# ---------------------------------------------------------------- neither yes nor no


def twice(*nodes: tuple[str, Op, str], **parameters: tuple[int, ...]) -> Graph:
    return raw({"m": (Mix(), "x"), **{name: (op, args) for name, op, args in nodes}}, parameters)


LINEAR_TWICE = {
    "p*v + p": (twice(("a", Multiply(), "m p"), ("y", Add(), "a p"), p=(4,)), 1),
    "p + p": (twice(("a", Add(), "m p"), ("y", Add(), "a p"), p=(4,)), 1),
    "W m + W x": (twice(("a", MatMul(), "m W"), ("b", MatMul(), "x W"), ("y", Add(), "a b"), W=(4, 4)), 4),
    "W N(m) - W N(x)": (
        twice(("n", RMSNorm(), "m"), ("k", RMSNorm(), "x"), ("a", MatMul(), "n W"), ("b", MatMul(), "k W"),
              ("c", Scale(-1.0), "b"), ("y", Add(), "a c m"), W=(4, 4)), 4),
    "a value read twice": (twice(("h", Multiply(), "m p"), ("g", Multiply(), "h x"), ("y", Add(), "g h m"), p=(4,)), 1),
    "(m + p) * x + U p": (
        twice(("a", Add(), "m p"), ("b", Multiply(), "a x"), ("c", Add(), "x p"), ("d", MatMul(), "c U"),
              ("y", Add(), "b d"), p=(4,), U=(4, 4)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_TWICE)
def test_a_parameter_that_is_used_twice_is_one_joint_equation(name: str) -> None:
    graph, capacity = LINEAR_TWICE[name]
    free = graph.restricted(["W"] if "W" in graph.parameter else ["p"])
    verdict = judge(free)
    assert verdict.patchable is True
    assert verdict.capacity == capacity
    for strategy in offers(Planner(free)):
        insist_on_plan(free, strategy)
        insist_on_plan(free, strategy, tokens=3, per_token=True)
        if capacity > 1:
            insist_on_plan(free, strategy, tokens=capacity)


NOT_LINEAR_TWICE = {
    "p*p": (twice(("a", Multiply(), "m p"), ("y", Multiply(), "a p"), p=(4,)), "not linear"),
    "W relu(W m)": (
        twice(("a", MatMul(), "m W"), ("b", Activation("relu"), "a"), ("y", MatMul(), "b W"), W=(4, 4)), "not linear"),
    "p - p": (twice(("s", Scale(-1.0), "a"), ("a", Add(), "m p"), ("b", Add(), "x p"), ("y", Add(), "s b"), p=(4,)),
              "cancel out"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LINEAR_TWICE)
def test_a_parameter_that_is_used_twice_otherwise_is_not_solved_for(name: str) -> None:
    graph, reason = NOT_LINEAR_TWICE[name]
    verdict = judge(graph)
    assert verdict.patchable is not True
    assert reason in reasons(verdict)


def test_parameters_before_the_mixing_only_are_not_solved_for() -> None:
    verdict = judge(small("llama").restricted(["attention.q_proj", "attention.k_proj", "attention.v_proj"]))
    assert verdict.patchable is None
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"attention.{name} lies upstream of a mixing node" in reasons(verdict)


def test_a_norm_scale_before_attention_is_upstream_too() -> None:
    verdict = judge(small("llama").restricted(["attention_norm.scale"]))
    assert verdict.patchable is None
    assert "attention_norm.scale lies upstream of a mixing node" in reasons(verdict)


def test_relu_behind_the_outer_matrix_is_an_open_condition() -> None:
    graph = block(outer(lambda v: mlp(v, activation="relu"))).restricted(["mlp.down_proj"])
    verdict = judge(graph)
    assert verdict.patchable is None
    (route,) = verdict.routes
    assert route.conditional
    assert [c.kind for c in route.conditions] == [Kind.OPEN]
    assert "fails for whole regions" in reasons(verdict)
    assert "mlp.hidden" in reasons(verdict)
    gelu = judge(block(outer(lambda v: mlp(v))).restricted(["mlp.down_proj"]))
    assert gelu.patchable is True


def test_a_relu_gate_is_an_open_condition_for_the_other_branch() -> None:
    graph = block(outer(lambda v: bk.GatedMLP(v, hidden=6, activation="relu", name="mlp")))
    verdict = judge(graph.restricted(["mlp.up_proj"]))
    assert verdict.patchable is None
    kinds = {c.text: c.kind for c in verdict.routes[0].conditions}
    assert kinds["mlp.down_proj diag(mlp.gate) has full row rank"] is Kind.OPEN


def test_partial_reaches_that_may_add_up_are_unknown() -> None:
    both = bk.Activation(bk.Linear(MIXED), "silu") + bk.Scale(bk.Activation(bk.Linear(MIXED), "silu"), -1.0)
    graph = block(MIXED + both)
    assert judge(graph).patchable is None
    assert attack(trial.draw(graph), starts=6) < 1e-6


# ---------------------------------------------------------------- where no may not be said


def test_scaling_by_zero_keeps_the_context_out() -> None:
    graph = raw({"m": (Mix(), "x"), "z": (Scale(0.0), "m"), "y": (Add(), "x z")})
    assert context_moves(trial.draw(graph)) == 0
    assert judge(graph).patchable is not False


@pytest.mark.parametrize(
    "graph",
    [
        raw({"m": (Mix(), "x"), "s": (Scale(-1.0), "m"), "y": (Add(), "x m s")}),
        raw({"m": (Mix(), "x"), "c": (Concat(), "m x"), "s": (Slice(Size.of(4), Size.of(8)), "c"),
             "y": (Add(), "x s")}),
    ],
    ids=["the context cancels", "the part without context is cut out"],
)  # fmt: skip
def test_an_output_that_no_context_moves_is_not_refuted(graph: Graph) -> None:
    assert context_moves(trial.draw(graph)) < 1e-12
    assert judge(graph).patchable is not False


def test_few_numbers_are_enough_where_the_context_reaches_little() -> None:
    graph = raw(
        {"m": (Mix(Size.of(1)), "x"), "h": (Add(), "p m p"), "u": (MatMul(), "h U"), "y": (Add(), "x u")},
        {"p": (1,), "U": (4, 1)}, frozen=["U"],
    )  # fmt: skip
    assert attack(trial.draw(graph)) < 1e-6
    assert judge(graph).patchable is not False
    assert judge(graph, tokens=1).patchable is not False


def test_subspaces_side_by_side_are_not_bounded() -> None:
    graph = raw(
        {"m": (Mix(Size.of(1)), "x"), "s": (Slice(Size.of(0), Size.of(1)), "x"), "h": (Add(), "p m p"),
         "k": (Add(), "q s q"), "a": (MatMul(), "h U"), "b": (MatMul(), "k V"), "c": (Concat(), "a b"),
         "y": (Add(), "x c")},
        {"p": (1,), "q": (1,), "U": (2, 1), "V": (2, 1)}, frozen=["U", "V"],
    )  # fmt: skip
    assert attack(loud(trial.draw(graph), 5.0)) < 1e-6
    assert judge(graph).patchable is not False


def test_no_token_count_is_promised_beyond_the_rank_of_what_a_matrix_reads() -> None:
    bottleneck = raw(
        {"m": (Mix(), "x"), "b": (MatMul(), "m B"), "a": (MatMul(), "b A"), "c": (MatMul(), "a W"),
         "y": (Add(), "x c")},
        {"B": (1, 4), "A": (6, 1), "W": (4, 6)}, frozen=["A", "B"],
    )  # fmt: skip
    assert attack(trial.draw(bottleneck, tokens=3)) > 1e-3
    assert judge(bottleneck, tokens=3).patchable is not True
    assert judge(bottleneck, tokens=1).patchable is True


def test_a_layer_norm_spans_one_dimension_less() -> None:
    centred = raw(
        {"m": (Mix(), "x"), "n": (LayerNorm(), "m"), "c": (MatMul(), "n W"), "y": (Add(), "x c")}, {"W": (4, 4)}
    )
    assert attack(trial.draw(centred, tokens=4)) > 1e-3
    assert judge(centred, tokens=4).patchable is not True
    assert judge(centred, tokens=3).patchable is True


def test_one_token_always_fits_a_matrix_of_unknown_width() -> None:
    d, k = Size.of("d"), Size.of("k")
    graph = Graph.build("x", "y", d, [Parameter("W", (d, d + k))], [
        Node("m", Mix(k), ("x",)), Node("c", Concat(), ("m", "x")), Node("w", MatMul(), ("c", "W")),
        Node("y", Add(), ("x", "w")),
    ])  # fmt: skip
    assert judge(graph).patchable is True
    assert judge(graph, tokens=1).patchable is True


@pytest.mark.parametrize(
    ("nodes", "parameters"),
    [
        ({"c": (Concat(), "m p"), "w": (MatMul(), "c W")}, {"p": (2,), "W": (4, 6)}),
        ({"c": (Add(), "p q"), "s": (Slice(Size.of(0), Size.of(4)), "c"), "w": (Add(), "s m")}, {"p": (4,), "q": (4,)}),
        ({"c": (Multiply(), "p q"), "s": (Concat(), "c"), "w": (Add(), "s m")}, {"p": (4,), "q": (4,)}),
    ],
    ids=["concat", "add", "multiply"],
)
def test_parameters_where_signals_belong_are_run_or_refused(
    nodes: dict[str, tuple[Op, str]], parameters: dict[str, tuple[int, ...]]
) -> None:
    try:
        graph = raw({"m": (Mix(), "x"), **nodes, "y": (Add(), "x w")}, parameters)
    except BadInput as error:
        assert "signal" in str(error)
        return
    for strategy in offers(Planner(graph)):
        insist_on_plan(graph, strategy)
        insist_on_plan(graph, strategy, 2, per_token=True)


# ---------------------------------------------------------------- cuts, fan-out, several mixing nodes


def test_cuts_are_the_nodes_all_context_goes_through() -> None:
    assert Planner(small("llama")).facts.cuts == ("y", "v", "attention.o_proj.out", "attention.heads")
    assert Planner(small("vanilla")).facts.cuts[0] == "mlp.down_proj.biased"
    assert Planner(parallel()).facts.cuts == (parallel().output, "add", "attention.o_proj.out", "attention.heads")


def test_a_value_that_two_read_is_restored_but_not_steered() -> None:
    """v feeds the sum and the norm: restoring it is a cut, steering it through the sum is not lawful."""
    graph = block(outer(lambda v: bk.RMSNorm(v, scale=False)))
    assert judge(graph).patchable is False
    biased = bk.Bias(MIXED, name="inner")
    graph = block(biased + bk.RMSNorm(biased, scale=False))
    verdict = judge(graph)
    assert served(verdict) == {("inner.bias",): "1"}
    assert verdict.routes[0].steps[0].goal == "inner"
    insist_on_plan(graph, "minimal")


def test_fan_out_of_a_value_without_context_is_not_steered() -> None:
    """u feeds two terms, one behind a tanh; moving u would move both."""
    graph = raw(
        {"m": (Mix(), "x"), "u": (Add(), "x b"), "t": (Activation("tanh"), "u"), "y": (Add(), "m u t")}, {"b": (4,)}
    )
    verdict = judge(graph)
    assert verdict.patchable is None
    assert "u is also read by t" in reasons(verdict)


def test_two_mixing_nodes_in_a_row() -> None:
    first = x + bk.Linear(bk.Mixer(x), name="first")
    graph = block(first + bk.Linear(bk.Mixer(first), name="second"))
    verdict = judge(graph)
    assert served(verdict) == {("second.weight",): "4"}
    insist_on_yes(graph, ["second.weight"], "4", tokens=(1, 4))
    blocked = judge(graph.restricted(["first.weight"]))
    assert blocked.patchable is None
    assert "first.weight lies upstream of a mixing node" in reasons(blocked)


def test_two_mixing_nodes_side_by_side() -> None:
    left, right = (bk.Linear(bk.Mixer(x), name=n) for n in ("left", "right"))
    graph = block(x + left + right)
    assert singles(judge(graph)) == {"left.weight": "4", "right.weight": "4"}
    for strategy in offers(Planner(graph)):
        insist_on_plan(graph, strategy)
    capped = block(x + bk.Softcap(left, 3.0) + bk.Softcap(right, 3.0))
    verdict = judge(capped)
    assert served(verdict) == {("left.weight", "right.weight"): "4"}
    insist_on_plan(capped, "paper")
    half = judge(capped.restricted(["left.weight"]))
    assert half.patchable is not True


def test_a_block_without_context_has_nothing_to_do() -> None:
    graph = block(x + mlp(x))
    verdict = judge(graph)
    assert verdict.patchable is True
    assert verdict.capacity == Capacity()
    assert make_plan(graph, "paper").steps == ()
    drawn = trial.draw(graph)
    assert trial.solve(drawn, make_plan(graph)).relative_linf == 0


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


# ---------------------------------------------------------------- sizes


def test_sizes_are_polynomials() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert str(Size.of("2*d + 3 - h*d")) == "-d*h + 2*d + 3"
    assert Size.of("d + 0*h") == d
    assert (d + h) * (d - h) == Size.of("d*d - h*h")
    assert (d - d).known == 0
    assert str(d - d) == "0"
    assert Size.of("3*4 - 2").known == 10
    assert Size.of("d*h").bind({"d": 3, "h": 4}).known == 12
    assert Size.of("d*h + 1").bind({"d": 3}) == Size.of("3*h + 1")
    assert Size.of("d*h").symbols == {"d", "h"}
    assert d.known is None
    assert Size.of(5).json() == 5
    assert (d * h).json() == "d*h"
    assert Size.of(d) is d
    assert Size.of(4) == 4
    assert hash(Size.of(4)) == hash(4), "what is equal has one hash"


POLYNOMIALS = st.dictionaries(
    st.lists(st.sampled_from("abc"), max_size=2).map(lambda m: tuple(sorted(m))), st.integers(-3, 3), max_size=4
).map(lambda terms: Size._collect(terms.items()))
NUMBERS = st.fixed_dictionaries({name: st.integers(1, 9) for name in "abc"})


@given(POLYNOMIALS, POLYNOMIALS, NUMBERS)
def test_size_arithmetic_agrees_with_numbers(a: Size, b: Size, numbers: dict[str, int]) -> None:
    def value(size: Size) -> int:
        found = size.bind(numbers).known
        assert found is not None
        return found

    assert value(a + b) == value(a) + value(b)
    assert value(a - b) == value(a) - value(b)
    assert value(a * b) == value(a) * value(b)
    assert a.known is not None or Size.of(str(a)) == a
    answer = a.at_most(b)
    assert answer is None or answer == (value(a) <= value(b))


@given(POLYNOMIALS, POLYNOMIALS)
def test_numbers_are_always_ordered(a: Size, b: Size) -> None:
    ones = dict.fromkeys("abc", 1)
    assert a.bind(ones).at_most(b.bind(ones)) is not None


def test_at_most_knows_what_follows_from_sizes_of_at_least_one() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert d.at_most(d * h) is True
    assert d.at_most(d + h) is True
    assert (d + h).at_most(d) is False
    assert d.at_most(h) is None
    assert Size.of(1).at_most(d * h) is True
    assert Size.of(1).at_most(d + h) is True
    assert Size.of(2).at_most(d + h) is True
    assert Size.of(3).at_most(d + h) is None
    assert (d + h).at_most(Size.of(1)) is False


@pytest.mark.parametrize("text", ["", "  ", "a b", "2d", "a**b", "a+", "*a", "a/2", "(a)", "1.5", "a-", "²", "--a"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a size"):
        Size.of(text)


@pytest.mark.parametrize("value", [-1, "-3", "2 - 5"])
def test_a_negative_size_is_refused(value: int | str) -> None:
    with pytest.raises(BadInput, match="negative"):
        Size.of(value)


@pytest.mark.parametrize("value", [4.5, None, True, [4]])
def test_what_is_neither_number_nor_text_is_no_size(value: object) -> None:
    with pytest.raises(BadInput):
        Size.of(value)  # type: ignore[arg-type]


def test_capacities() -> None:
    d, h = Size.of("d"), Size.of("h")
    assert str(Capacity()) == "any"
    assert Capacity().json() is None
    assert Capacity().serves(10**9) is True
    assert (Capacity.of(3) & Capacity.of(5)) == Capacity.of(3)
    assert str(Capacity.of(d) & Capacity.of(h)) == "min(d, h)"
    assert (Capacity.of(d * h) & Capacity.of(d)) == Capacity.of(d)
    assert (Capacity.of(d) & Capacity.of(1)) == Capacity.of(1)
    assert Capacity.of(d).serves(1) is True
    assert Capacity.of(d).serves(2) is None
    assert Capacity.of(d, 3).serves(4) is False
    assert Capacity.of(4).serves(4) is True
    assert Capacity.of(4).json() == 4
    assert Capacity.of(d + h).serves(1) is True
    assert Capacity.of(4).estimate() < Capacity.of(d).estimate() < Capacity().estimate()


def test_rms_norm_of_a_cut_may_be_undone_by_a_matrix_behind_it() -> None:
    """A norm stops what lies behind it, not what comes after it."""
    graph = raw(
        {"m": (Mix(), "x"), "n": (RMSNorm(), "m"), "c": (Softcap(5.0), "n"), "y": (MatMul(), "c W")}, {"W": (4, 4)}
    )
    insist_on_yes(graph, ["W"], "4", tokens=(1, 4))
