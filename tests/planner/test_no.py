"""A no with the right reason, and each backed by an attack; what is neither yes nor no; where no may not be said."""

import pytest
from judging import (
    MIXED,
    attack,
    block,
    context_moves,
    insist_on_no,
    insist_on_plan,
    loud,
    mlp,
    outer,
    raw,
    reasons,
    small,
)

import blockkit as bk
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
    Softmax,
)
from blockkit.graph.sizes import Size
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials import trial

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
