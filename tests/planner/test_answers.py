"""The expected answers: by which parameters, for how many tokens, and where the context goes through."""

import pytest
from judging import (
    MIXED,
    block,
    insist_on_no,
    insist_on_plan,
    insist_on_yes,
    mlp,
    outer,
    parallel,
    raw,
    reasons,
    served,
    singles,
    small,
    x,
)

import blockkit as bk
from blockkit.design import catalog
from blockkit.graph.laws import Kind
from blockkit.graph.ops import Activation, Add, MatMul, Mix, RMSNorm, Softcap
from blockkit.graph.sizes import Capacity, Size
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials import trial


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


def test_rms_norm_of_a_cut_may_be_undone_by_a_matrix_behind_it() -> None:
    """A norm stops what lies behind it, not what comes after it."""
    graph = raw(
        {"m": (Mix(), "x"), "n": (RMSNorm(), "m"), "c": (Softcap(5.0), "n"), "y": (MatMul(), "c W")}, {"W": (4, 4)}
    )
    insist_on_yes(graph, ["W"], "4", tokens=(1, 4))
