"""Mixtures of experts: transformers' own modules, and what the planner makes of them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import expert_checks as checks
import numpy as np
import pytest
from expert_checks import HIDDEN, KINDS, WIDTH, block_of
from small_blocks import SMALL, blocks

from blockkit.errors import BadInput, ConditionViolated, NotPatchable
from blockkit.graph.changes import MatrixChange
from blockkit.graph.graph import Graph, Node
from blockkit.graph.laws import Kind
from blockkit.graph.ops.routing import TopK
from blockkit.graph.sizes import Size
from blockkit.planner.plan import make_plan
from blockkit.planner.verdict import judge
from blockkit.trials.sequence import SequenceTrial, draw_sequence
from blockkit.trials.trial import Result, solve

State = dict[str, np.ndarray]
LIMIT, SEEN = 1e-9, 1e-3  # relative: a patched block's error at most, an unpatched one's at least

# -- the modules of transformers -----------------------------------------------------------------


@dataclass(frozen=True)
class Class:
    """A module of transformers: its family, its name, its settings and its tensors as the component's parameters."""

    family: str
    name: str
    settings: dict[str, Any]
    weights: Callable[[State], State]


def rows(stacked: np.ndarray) -> np.ndarray:
    """`[experts, hidden, d_model]` as the component stacks first projections."""
    return stacked.reshape(-1, stacked.shape[-1])


def columns(stacked: np.ndarray) -> np.ndarray:
    """`[experts, d_model, hidden]` as the component stacks last projections."""
    return np.concatenate(list(stacked), axis=1)


def fused(router: str = "gate.weight", shared: str = "") -> Callable[[State], State]:
    """`gate_up_proj [experts, 2*hidden, d_model]`, the gates first, and perhaps a shared expert."""

    def weights(state: State) -> State:
        gate, up = np.split(state["experts.gate_up_proj"], 2, axis=1)
        found = {"router": state[router], "gate_proj": rows(gate), "up_proj": rows(up)}
        found["down_proj"] = columns(state["experts.down_proj"])
        for slot in ("gate_proj", "up_proj", "down_proj") if shared else ():
            found[f"shared.{slot}"] = state[f"{shared}.{slot}.weight"]
        return found

    return weights


def with_shared_gate(state: State) -> State:
    return fused(shared="shared_expert")(state) | {"shared_gate": state["shared_expert_gate.weight"]}


def with_correction(state: State) -> State:
    return fused(shared="shared_experts")(state) | {"correction": state["gate.e_score_correction_bias"]}


def other_way_round(state: State) -> State:
    """Llama 4 holds its experts' matrices transposed."""
    turned = {n: v.transpose(0, 2, 1) if v.ndim == 3 else v for n, v in state.items()}
    return fused("router.weight", "shared_expert")(turned)


def interleaved(state: State) -> State:
    """gpt-oss: transposed, and gate and up by turns."""
    both, biases = state["experts.gate_up_proj"].transpose(0, 2, 1), state["experts.gate_up_proj_bias"]
    return {
        "router": state["router.weight"], "router_bias": state["router.bias"],
        "gate_proj": rows(both[:, ::2]), "gate_proj_bias": biases[:, ::2].ravel(),
        "up_proj": rows(both[:, 1::2]), "up_proj_bias": biases[:, 1::2].ravel(),
        "down_proj": columns(state["experts.down_proj"].transpose(0, 2, 1)),
        "down_proj_bias": state["experts.down_proj_bias"].T,
    }  # fmt: skip


def one_by_one(state: State) -> State:
    """Switch: a pair of matrices an expert."""
    each = [[state[f"experts.expert_{e}.{m}.weight"] for e in range(6)] for m in ("wi", "wo")]
    up, down = np.concatenate(each[0]), np.concatenate(each[1], axis=1)
    return {"router": state["router.classifier.weight"], "up_proj": up, "down_proj": down}


SIZES = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "num_attention_heads": 2}
HF: dict[str, Class] = {
    "mixtral": Class(
        "mixtral", "MixtralSparseMoeBlock", {**SIZES, "num_local_experts": 6, "intermediate_size": HIDDEN}, fused()),
    "qwen2-moe": Class(
        "qwen2_moe", "Qwen2MoeSparseMoeBlock",
        {**SIZES, "num_experts": 6, "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": 7},
        with_shared_gate),
    "qwen3-moe": Class(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock",
        {**SIZES, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": HIDDEN,
         "norm_topk_prob": True}, fused()),
    "deepseek-v3": Class(
        "deepseek_v3", "DeepseekV3MoE",
        {**SIZES, "n_routed_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": HIDDEN,
         "n_shared_experts": 2, "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        with_correction),
    "gpt-oss": Class(
        "gpt_oss", "GptOssMLP", {**SIZES, "num_local_experts": 6, "intermediate_size": HIDDEN, "swiglu_limit": 0.7},
        interleaved),
    "llama4": Class(
        "llama4", "Llama4TextMoe", {**SIZES, "num_local_experts": 6, "intermediate_size": HIDDEN}, other_way_round),
    "switch": Class(
        "switch_transformers", "SwitchTransformersSparseMLP",
        {"d_model": WIDTH, "d_ff": HIDDEN, "num_experts": 6, "expert_capacity": 999}, one_by_one),
}  # fmt: skip


def observed(name: str, faint: float = 0.0) -> tuple[State, np.ndarray, np.ndarray]:
    """The random module's weights as the component's, and what went in and out of it, `[40, 12]`, in float64.

    `faint` is added to all of the router's logits.
    """
    families = pytest.importorskip("families")
    import torch
    import transformers

    case = HF[name]
    config_type = {"llama4": "llama4_text"}.get(case.family, case.family)
    config = transformers.CONFIG_MAPPING[config_type](**case.settings)
    config._experts_implementation = "eager"
    module_of = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    generator = torch.Generator().manual_seed(3)
    with families.in_float64():
        module = getattr(module_of, case.name)(config).eval()
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if tensor.ndim == 1 else 1.0))
        x = torch.randn((1, 40, WIDTH), generator=generator)
        if faint:
            x[..., 0] = 1.0
            module.gate.weight[:, 0] = faint
        out = module(x)
        y = out[0] if isinstance(out, tuple) else out
    weights = case.weights({n: v.detach().numpy() for n, v in module.state_dict().items()})
    return {f"mlp.{slot}": v for slot, v in weights.items()}, x[0].numpy(), y.reshape(x.shape)[0].detach().numpy()


def difference(settings: dict[str, Any], given: State, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.abs(checks.run(checks.graph_of(settings), given, x) - y).max() / np.abs(y).max())


@pytest.mark.parametrize("name", HF)
def test_same_as_transformers(name: str) -> None:
    given, x, y = observed(name)
    assert {p.name for p in checks.graph_of(KINDS[name]).parameters} == given.keys()
    assert difference(KINDS[name], given, x, y) <= 1e-13


NEEDED = [(n, s) for n in HF for s in KINDS[n] if s not in ("experts", "gated", "eps")]


@pytest.mark.parametrize(("name", "setting"), NEEDED)
def test_every_setting_of_a_kind_is_needed(name: str, setting: str) -> None:
    """The comparison sees each of them."""
    dropped = ("groups", "top_groups") if setting == "groups" else (setting,)
    other = {k: v for k, v in KINDS[name].items() if k not in dropped}
    if setting == "top_k":
        other["top_k"] = KINDS[name]["top_k"] + 1
    assert difference(other, *observed(name)) > 1e-3


def test_scores_near_and_at_zero() -> None:
    """DeepSeek-V3 adds 1e-20 to the sum that it divides by: it shows where the scores are as small, and at zero."""
    faint = observed("deepseek-v3", -46.0)
    assert difference(KINDS["deepseek-v3"], *faint) <= 1e-13
    assert difference({**KINDS["deepseek-v3"], "eps": 0.0}, *faint) > 1e-3
    assert difference(KINDS["deepseek-v3"], *observed("deepseek-v3", -2000.0)) <= 1e-13


def test_a_switched_off_expert_does_not_spoil_its_group() -> None:
    given, x, _ = observed("deepseek-v3")
    wanted = checks.run(checks.graph_of(KINDS["deepseek-v3"]), {**given, "mlp.correction": np.r_[-1e9, [0.0] * 8]}, x)
    off = checks.run(checks.graph_of(KINDS["deepseek-v3"]), {**given, "mlp.correction": np.r_[-np.inf, [0.0] * 8]}, x)
    assert np.array_equal(off, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4, "top_k": 5}, "5 of 4 experts"),
        ({"experts": 6, "top_k": 2, "groups": 4}, "6 experts cannot be put into 4 equal groups"),
        ({"experts": 6, "top_k": 4, "groups": 3}, "4 experts cannot be chosen from 1 of 3 groups"),
        ({"experts": 6, "top_k": 1, "groups": 2, "top_groups": 3}, "3 of 2 groups"),
        ({"experts": 6, "top_k": 1, "scale": 0}, "scale of 0"),
        ({"experts": 6, "top_k": 1, "eps": -1.0}, "eps must not be negative"),
        ({"experts": 6, "top_k": 1, "scores": "tanh"}, "'softmax' or 'sigmoid'"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        checks.graph_of(settings)


def test_groups_without_a_number_do_not_run() -> None:
    """A symbol is fine for judging; a run with some other number of groups would be wrong."""
    settings = {**KINDS["deepseek-v3"], "groups": "groups", "top_groups": "groups"}
    assert judge(block_of(settings)).patchable is True
    given, x, _ = observed("deepseek-v3")
    with pytest.raises(BadInput, match="groups = groups has no number yet"):
        checks.run(checks.graph_of(settings), given, x)


# -- the planner ---------------------------------------------------------------------------------


def only(graph: Graph, *names: str) -> Graph:
    return graph.restricted(only=names)


def node_values(trial: SequenceTrial, contextual: bool, changed: Result | None, *wants: str) -> State:
    parameters = trial.parameters if changed is None else changed.patched_parameters
    return trial.rows(contextual, wants, parameters, slice(None))


@pytest.mark.parametrize("name", KINDS)
def test_the_paper_plan_restores_the_router(name: str) -> None:
    """Its logits, the choice and the measured weights; each differs without the patch."""
    plan = make_plan(block_of(KINDS[name]), "paper")
    inner = [p for p in ("mlp.router", "mlp.gate_proj", "mlp.up_proj") if p in plan.graph.parameter]
    assert plan.route.parameters[: len(inner)] == tuple(inner)
    assert plan.route.parameters[-1].endswith("down_proj")
    chosen_before = []
    for seed in (2, 3, 4, 5, 11):
        trial = draw_sequence(plan.graph, seed, tokens=1)
        result = solve(trial, plan)
        assert result.relative_linf <= LIMIT
        assert result.unpatched_relative >= SEEN
        (logits, *_), weights = plan.graph.node["mlp.weights"].args, "mlp.weights"
        wanted, found = (node_values(trial, c, None if c else result, logits, weights) for c in (True, False))
        before = node_values(trial, False, None, logits, weights)
        for node in (logits, weights):
            assert np.abs(found[node] - wanted[node]).max() <= LIMIT * np.abs(wanted[node]).max()
            assert np.abs(before[node] - wanted[node]).max() >= SEEN
        assert np.array_equal(found[weights] != 0, wanted[weights] != 0)
        chosen_before.append(np.array_equal(before[weights] != 0, wanted[weights] != 0))
    assert not all(chosen_before), "the context must change the choice for the test to show anything"


def serves(family: str, part: str = "mlp.") -> dict[str, int]:
    """For every route by one parameter, how many tokens it serves; the family's last kind of block, small."""
    graph = list(blocks(family).values())[-1]
    found = {}
    for route in judge(graph).routes:
        if len(route.steps) == 1 and route.parameters[0].startswith(part):
            expert = " of one expert" if route.steps[0].block else ""
            found[route.parameters[0] + expert] = int(str(route.capacity))
    return found


def test_which_routes_there_are_and_how_many_tokens_they_serve() -> None:
    """Chosen experts times their width; a bias of each expert: one token for each that is chosen."""
    chosen, width, shared = SMALL["top_k"] * SMALL["d_ff"], SMALL["d_model"], SMALL["shared"]
    usual = {"mlp.down_proj": chosen, "mlp.down_proj of one expert": 1}
    through = {"mlp.up_proj": width}
    beside = {"mlp.shared.down_proj": shared}
    assert serves("mixtral") == serves("qwen3-moe") == {**usual, **through}
    assert serves("qwen2-moe").items() >= {**usual, **through, **beside}.items()
    assert serves("deepseek-v3").items() >= {**usual, **through, **beside}.items()
    assert serves("llama4").items() >= {**usual, **through, "mlp.shared.down_proj": SMALL["d_ff"]}.items()
    assert serves("gpt-oss") == {**usual, "mlp.down_proj_bias": SMALL["top_k"]}
    assert serves("switch") == {"mlp.down_proj": SMALL["d_ff"], "mlp.down_proj of one expert": 1}
    arctic = {"experts.down_proj": chosen, "experts.down_proj of one expert": 1, "experts.up_proj": width}
    assert serves("arctic", "experts.") == arctic
    assert not serves("grok1"), "its experts stand behind a norm, which bounds them"


@pytest.mark.parametrize("name", KINDS)
def test_what_the_experts_hang_on(name: str) -> None:
    """Chosen weights are never zero but by rounding; a relu may be zero for every chosen expert."""
    for strategy in ("minimal", "stable"):
        (step,) = make_plan(only(block_of(KINDS[name]), "mlp.down_proj"), strategy).route.steps
        kinds = {c.kind for c in step.conditions}
        assert kinds == ({Kind.OPEN} if name == "switch" else {Kind.GENERIC})
        assert (step.block == HIDDEN) is (strategy == "minimal")


@pytest.mark.parametrize("name", KINDS)
def test_one_expert_alone(name: str) -> None:
    """For each of many tokens another: an active one, the others' columns of the change exactly zero."""
    settings = KINDS[name]
    plan = make_plan(only(block_of(settings), "mlp.down_proj"), "minimal")
    assert str(plan.numbers_stored) == str(WIDTH + HIDDEN)
    trial = draw_sequence(plan.graph, 3, query=8)
    result = solve(trial, plan, per_token=True)
    assert result.relative_linf <= LIMIT
    assert result.unpatched_relative >= SEEN
    (change,) = result.changes.values()
    assert isinstance(change, MatrixChange)
    moved = np.any(change.right.reshape(8, settings["experts"], HIDDEN) != 0, axis=2)
    assert np.array_equal(moved.sum(axis=1), np.ones(8))
    weights = node_values(trial, False, None, "mlp.weights")["mlp.weights"]
    assert np.all(weights[moved] != 0)
    assert np.array_equal((weights != 0).sum(axis=1), np.full(8, settings["top_k"]))
    assert len(set(np.argmax(moved, axis=1))) > 1, "all tokens chose the same expert: nothing is shown"
    columns_of = np.repeat(moved, HIDDEN, axis=1)
    before, after = trial.parameters["mlp.down_proj"], result.patched_parameters["mlp.down_proj"]
    for token in range(8):
        assert np.array_equal(after[token][:, ~columns_of[token]], before[:, ~columns_of[token]])
        assert not np.array_equal(after[token][:, columns_of[token]], before[:, columns_of[token]])


def test_a_relu_that_is_zero_in_every_chosen_expert_is_a_refusal() -> None:
    trial = draw_sequence(block_of(KINDS["switch"]), tokens=1)
    z = node_values(trial, False, None, "mlp_norm")["mlp_norm"]
    flat = {**trial.parameters, "mlp.up_proj": np.repeat(-z, KINDS["switch"]["experts"] * HIDDEN, axis=0)}
    trial = replace(trial, parameters=flat)
    for strategy in ("minimal", "stable"):
        with pytest.raises(ConditionViolated, match=r"'mlp\.weighted' is exactly zero"):
            solve(trial, make_plan(only(trial.graph, "mlp.down_proj"), strategy))


def routed(settings: dict[str, Any], bias: np.ndarray, tokens: int, seed: int = 2) -> SequenceTrial:
    """A block whose router has that bias."""
    trial = draw_sequence(block_of({**settings, "router_bias": True}), seed, query=tokens)
    return replace(trial, parameters={**trial.parameters, "mlp.router_bias": bias})


@pytest.mark.parametrize("same", [True, False], ids=["all tokens to the same experts", "as it comes"])
@pytest.mark.parametrize(
    ("parameter", "capacity", "settings"),
    [("mlp.down_proj", 2 * HIDDEN, KINDS["mixtral"]), ("mlp.down_proj_bias", 2, {**KINDS["mixtral"], "bias": True}),
     ("mlp.down_proj", HIDDEN, {"experts": 6, "top_k": 1})],
)  # fmt: skip
def test_as_many_tokens_as_promised_whatever_the_routing(
    parameter: str, capacity: int, settings: dict[str, Any], same: bool
) -> None:
    bias = np.array([60.0, 60.0, 0, 0, 0, 0]) if same else np.zeros(6)
    if same and settings["top_k"] == 1:
        bias[1] = 0.0
    trial = routed(settings, bias, capacity)
    plan = make_plan(only(trial.graph, parameter), "joint", capacity)
    assert plan.route.capacity.serves(capacity) is True
    assert plan.route.capacity.serves(capacity + 1) is False
    chosen = node_values(trial, False, None, "mlp.weights")["mlp.weights"] != 0
    assert (len(np.unique(chosen, axis=0)) == 1) is same, "another seed is needed"
    result = solve(trial, plan)
    assert result.relative_linf <= LIMIT
    assert result.unpatched_relative >= SEEN


def test_one_token_more_than_promised() -> None:
    """It may be had where tokens are spread over experts; it is not where all are sent to the same."""
    settings, capacity = KINDS["mixtral"], 2 * HIDDEN
    trial = routed(settings, np.array([60.0, 60.0, 0, 0, 0, 0]), capacity + 1)
    graph = only(trial.graph, "mlp.down_proj")
    with pytest.raises(NotPatchable):
        make_plan(graph, "joint", capacity + 1)
    with pytest.raises(ConditionViolated, match=f"have rank {capacity} only"):
        solve(trial, make_plan(graph, "joint"))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_the_papers_form_is_another_solution(name: str) -> None:
    """Every active expert shifted by delta / S, S the sum of the weights as measured (for Qwen 2 MoE not 1)."""
    settings = KINDS[name]
    plan = make_plan(only(block_of(settings), "mlp.down_proj"), "stable")
    trial = draw_sequence(plan.graph, 1, tokens=1)
    ours = solve(trial, plan)
    here = node_values(trial, False, None, "mlp.weights", "mlp.hidden", "y")
    delta = (node_values(trial, True, None, "y")["y"] - here["y"])[0]
    weights, hidden = here["mlp.weights"][0], here["mlp.hidden"].reshape(settings["experts"], HIDDEN)
    total = weights.sum()
    assert bool(abs(total - 1) > 0.01) is (name == "qwen2-moe")
    change = np.zeros((settings["experts"], WIDTH, HIDDEN))
    for expert in np.flatnonzero(weights):  # W_e h_e moves by delta / S
        h = hidden[expert]
        change[expert] = np.outer(delta / total, h) / (h @ h)
    theirs = columns(change)
    changed = trial.parameters["mlp.down_proj"] + theirs
    found = trial.rows(False, ("y",), {**trial.parameters, "mlp.down_proj": changed}, slice(None))["y"]
    wanted = ours.output_contextual
    assert np.abs(found - wanted).max() <= LIMIT * np.abs(wanted).max()
    assert ours.relative_linf <= LIMIT
    stacked = ours.patched_parameters["mlp.down_proj"] - trial.parameters["mlp.down_proj"]
    weighted = (weights[:, None] * hidden).ravel()
    assert stacked @ weighted == pytest.approx(delta, rel=1e-9)
    assert theirs @ weighted == pytest.approx(delta, rel=1e-9)
    assert np.linalg.norm(stacked) < 0.999 * np.linalg.norm(theirs), "ours has the least norm of all"


SIGMOID = {"experts": 6, "top_k": 2, "scores": "sigmoid", "eps": 1e-20}


@pytest.mark.parametrize("strategy", ["minimal", "stable", "paper"])
@pytest.mark.parametrize("per_token", [False, True])
def test_all_chosen_weights_zero_is_a_refusal(strategy: str, per_token: bool) -> None:
    """The scores underflow, so no expert contributes anything; another parameter still serves."""
    trial = routed(SIGMOID, np.full(6, -2000.0), 1)
    graph = only(trial.graph, "mlp.down_proj")
    with pytest.raises(ConditionViolated, match=r"'mlp\.weighted' is exactly zero") as raised:
        solve(trial, make_plan(graph, strategy), per_token)
    assert (raised.value.node, raised.value.parameter) == ("mlp.down_proj.out", "mlp.down_proj")
    assert raised.value.size > SEEN
    assert solve(trial, make_plan(only(trial.graph, "attention.o_proj"), strategy), per_token).relative_linf <= LIMIT


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_a_weight_that_is_zero_or_nearly_so_is_no_obstacle(name: str) -> None:
    """One of the two chosen weights exactly zero: the other carries the change. Tiny ones: as any other."""
    bias = np.array([0.0, *[-np.inf] * 5]) if name == "softmax" else np.full(6, -500.0)
    trial = routed(KINDS["mixtral"] if name == "softmax" else {**SIGMOID, "normalise": False}, bias, 3)
    weights = node_values(trial, False, None, "mlp.weights")["mlp.weights"]
    assert np.array_equal((weights != 0).sum(axis=1), np.full(3, 1 if name == "softmax" else 2))
    assert name == "softmax" or weights.max() < 1e-170
    result = solve(trial, make_plan(only(trial.graph, "mlp.down_proj"), "minimal"), per_token=True)
    assert result.relative_linf <= LIMIT
    assert result.unpatched_relative >= SEEN
    (change,) = result.changes.values()
    if name == "softmax":
        assert isinstance(change, MatrixChange)
        assert not change.right[:, HIDDEN:].any()


def test_holes_of_one_choice_do_not_add_up() -> None:
    """Two factors with the same holes leave the others; those of two routers may leave nothing."""
    graph = block_of(KINDS["llama4"])
    assert not make_plan(only(graph, "mlp.down_proj"), "stable").route.conditional
    second = TopK(Size.of(2), "sigmoid", False)
    logits, up = graph.node["mlp.router.out"], graph.node["mlp.up_proj.weighted"]
    nodes = [replace(n, args=(n.args[0], "other.repeated")) if n is up else n for n in graph.nodes]
    nodes += [
        replace(logits, name="other"),
        Node("weights", second, ("other",)),
        replace(graph.node["mlp.weights_repeated"], name="other.repeated", args=("weights",)),
    ]
    mixed = Graph.build(graph.input, graph.output, graph.width, graph.parameters, nodes)
    assert make_plan(only(mixed, "mlp.down_proj"), "stable").route.conditional
