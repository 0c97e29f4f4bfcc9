"""Mixers other than attention: the same numbers as other people's implementations, and patches through them."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import python

import blockkit as bk
from blockkit.absorbing.algorithm import absorb
from blockkit.absorbing.executor import Executor, reference
from blockkit.absorbing.request import Request
from blockkit.absorbing.run import fill_cache, logits_of, run_stream
from blockkit.checkpoint.model import open_model
from blockkit.design import catalog
from blockkit.errors import BadInput, ConditionViolated
from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph
from blockkit.graph.ops.mixing import MixingOp
from blockkit.graph.packing import Packing, Past
from blockkit.planner.plan import STRATEGIES, make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials.sequence import SequenceTrial, draw_sequence
from blockkit.trials.trial import draw, numbers_of, random_parameters, solve

LIMIT = 1e-9  # relative, float64
TOKENS = 11
SIZES: dict[str, Any] = {
    "d_model": 16, "d_ff": 24, "inner": 20, "state": 5, "dt_rank": 3, "kernel": 4, "heads": 4, "head_dim": 6,
    "value_dim": 7, "length": 40, "places": 18, "d_tokens": 10, "window": 30, "layers": 2, "vocabulary": 37,
    "context_length": 64, "tied": True,
}  # fmt: skip
FAMILIES = ("mamba", "mamba2", "rwkv", "retnet", "hyena", "mlp-mixer", "poolformer", "attention-only")
ARRAYS = NumpyArrays()
Values = Mapping[str, np.ndarray]


def block(family: str, **sizes: Any) -> Graph:
    return catalog.entry(family).bound({**SIZES, **sizes}, family).graphs["block"]


def random_values(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    return random_parameters(graph, numbers_of(graph), np.random.default_rng(seed))


def run(graph: Graph, parameters: Values, stream: np.ndarray, first: int = 0, node: str = "") -> np.ndarray:
    """The block's output, or another node, for one sequence whose first token stands at `first`."""
    packing = Packing(np.arange(first, first + len(stream)), (len(stream),))
    wanted = node or graph.output
    return evaluate(graph, ARRAYS, parameters, {graph.input: stream}, [wanted], packing)[wanted]


def some_rows(count: int = TOKENS, width: int = 16, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float64
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# ---------------------------------------------------------------- against the classes of transformers

torch = pytest.importorskip("torch", reason="PyTorch is needed to compare with the Hugging Face classes")
transformers = pytest.importorskip("transformers", reason="transformers is needed to compare with its classes")
from families import in_float64  # noqa: E402

MAMBA = {"vocab_size": 37, "hidden_size": 16, "state_size": 5, "num_hidden_layers": 2, "conv_kernel": 4}
MAMBA2 = {
    "vocab_size": 37, "hidden_size": 12, "expand": 2, "num_heads": 4, "head_dim": 6, "state_size": 5,
    "conv_kernel": 4, "num_hidden_layers": 1, "chunk_size": 4,
}  # fmt: skip
RWKV = {
    "vocab_size": 37, "hidden_size": 16, "attention_hidden_size": 20, "intermediate_size": 24,
    "num_hidden_layers": 2, "context_length": 64,
}  # fmt: skip


def randomised(module: Any, seed: int = 3) -> Any:
    """The module with every weight random: matrices of scale 1/sqrt(d_in), vectors of order one."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        scale = 1.0 if max(p.shape) == p.numel() else p.shape[-1] ** -0.5
        p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def filled(graph: Graph, module: Any, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The graph's parameters out of the module's, by name; every one of the module's is used."""
    theirs = {n: p.detach().numpy() for n, p in module.named_parameters()}
    assert sorted(names.values()) == sorted(theirs) and sorted(names) == sorted(p.name for p in graph.parameters)
    shapes = numbers_of(graph)
    return {ours: theirs[name].reshape(shapes[ours]) for ours, name in names.items()}


MAMBA_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_rank": 4},
    "untied": {"tie_word_embeddings": False, "expand": 3, "layer_norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def mamba_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Random Mamba checkpoints, each with the logits that its own class gives for `ids()`."""
    made = {}
    for name, settings in MAMBA_SETTINGS.items():
        path = tmp_path_factory.mktemp(name)
        with in_float64():
            theirs = randomised(transformers.MambaForCausalLM(transformers.MambaConfig(**{**MAMBA, **settings})))
            theirs.save_pretrained(path)
            logits = theirs(input_ids=torch.tensor(ids())[None], use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        made[name] = path, logits.numpy()
    return made


def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 37, TOKENS)


def logits(executor: Executor, tokens: np.ndarray, positions: np.ndarray, **settings: Any) -> np.ndarray:
    return logits_of(executor, run_stream(executor, tokens, positions, **settings))


@pytest.mark.parametrize("name", MAMBA_SETTINGS)
def test_mamba_gives_the_logits_of_its_class(name: str, mamba_folders: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, theirs = mamba_folders[name]
    model = open_model(path)
    positions = np.arange(TOKENS)
    assert apart(logits(reference(model), ids(), positions), theirs) <= LIMIT
    assert model.architecture.tied is (name != "untied")
    assert apart(logits(reference(model), ids()[::-1], positions), theirs) > 1e-2


def test_a_cache_changes_nothing(mamba_folders: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, theirs = mamba_folders["plain"]
    executor, positions = reference(open_model(path)), np.arange(TOKENS)
    cache = fill_cache(executor, ids()[:7], positions[:7])
    assert apart(logits(executor, ids()[7:], positions[7:], cache=cache), theirs[7:]) <= LIMIT


@pytest.mark.parametrize("tokens", ["last", "each", "all"])
def test_a_context_is_absorbed_into_a_whole_mamba(
    tokens: str, mamba_folders: dict[str, tuple[Path, np.ndarray]]
) -> None:
    """Block by block; the edited model's ordinary run on the query alone gives the contextual logits."""
    path, theirs = mamba_folders["plain"]
    executor = reference(open_model(path))
    done = absorb(executor, Request(ids()[:7], ids()[7:], tokens), "joint" if tokens == "all" else None)
    served = slice(None) if tokens != "last" else slice(-1, None)
    assert apart(done.patched[served], theirs[7:][served]) <= LIMIT
    alone = logits(executor, ids()[7:], np.arange(7, TOKENS))
    assert apart(alone[served], theirs[7:][served]) > 1e-2


def test_every_mamba_tensor_is_read(mamba_folders: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, theirs = mamba_folders["biases"]
    executor = reference(open_model(path))
    for i, (slot, value) in enumerate(executor.parameters.items()):
        noise = 1e-4 * np.random.default_rng(i).normal(size=value.shape)
        changed = Executor(executor.architecture, ARRAYS, {**executor.parameters, slot: value + noise}, "float64")
        assert apart(logits(changed, ids(), np.arange(TOKENS)), theirs) > 100 * LIMIT, slot


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_its_class(groups: int) -> None:
    settings = {"state": 5, "heads": 4, "head_dim": 6, "d_model": 12, "groups": groups, "eps": 1e-5}
    graph = block("mamba2", **settings)
    config = transformers.Mamba2Config(**MAMBA2, n_groups=groups)
    stream = some_rows(width=12)
    with in_float64():
        theirs = randomised(transformers.models.mamba2.modeling_mamba2.Mamba2Block(config, layer_idx=0))
        wanted = theirs(torch.tensor(stream)[None])[0].numpy()
    own = ("A_log", "D", "dt_bias")
    names = {
        "norm.scale": "norm.weight", "mixer.norm_scale": "mixer.norm.weight", "mixer.conv": "mixer.conv1d.weight",
        "mixer.conv_bias": "mixer.conv1d.bias", "mixer.in_proj": "mixer.in_proj.weight",
        "mixer.out_proj": "mixer.out_proj.weight", **{f"mixer.{n}": f"mixer.{n}" for n in own},
    }  # fmt: skip
    assert apart(run(graph, filled(graph, theirs, names), stream), wanted) <= LIMIT


def test_rwkv_equals_its_class() -> None:
    x = bk.stream()
    v = x + bk.components.TimeMix(bk.LayerNorm(x, name="time_norm"), inner=20, name="time_mix")
    y = v + bk.components.ChannelMix(bk.LayerNorm(v, name="channel_norm"), hidden=24, name="channel_mix")
    graph, stream = bk.Block(y, width=16).graph(), some_rows()
    with in_float64():
        module = transformers.models.rwkv.modeling_rwkv.RwkvBlock(transformers.RwkvConfig(**RWKV), layer_id=1)
        theirs = randomised(module)
        wanted = theirs(torch.tensor(stream)[None])[0][0].numpy()
    names = {}
    parts = [("time", "attention", "key value receptance"), ("channel", "feed_forward", "key receptance")]
    for number, (ours, part, shifts) in enumerate(parts, 1):
        names |= {f"{ours}_norm.scale": f"ln{number}.weight", f"{ours}_norm.bias": f"ln{number}.bias"}
        names |= {f"{ours}_mix.mix_{s}": f"{part}.time_mix_{s}" for s in shifts.split()}
        names |= {f"{ours}_mix.{s}": f"{part}.{s}.weight" for s in ("key", "value", "receptance")}
    names |= {f"time_mix.{n}": f"attention.time_{n}" for n in ("decay", "first")}
    names["time_mix.output"] = "attention.output.weight"
    assert apart(run(graph, filled(graph, theirs, names), stream), wanted) <= LIMIT


# ---------------------------------------------------------------- against plain definitions


def test_retention_equals_its_recurrent_form() -> None:
    """The state of a head decays by its own rate; rotation by complex numbers, as the paper writes it."""
    graph = block("retnet")
    parameters, stream, first = random_values(graph), some_rows(), 9
    found = run(graph, parameters, stream, first, "retention.heads")
    z = run(graph, parameters, stream, first, "retention_norm")
    heads, dim, value_dim = SIZES["heads"], SIZES["head_dim"], SIZES["value_dim"]
    q, k, v = (z @ parameters[f"retention.{s}_proj"].T for s in "qkv")
    angles = 10000.0 ** -np.linspace(0, 1, dim // 2)
    rows = []
    for head in range(heads):
        state, out = np.zeros((dim // 2, value_dim), complex), []
        mine, values = slice(head * dim, (head + 1) * dim), slice(head * value_dim, (head + 1) * value_dim)
        for n in range(TOKENS):
            turn = np.exp(1j * (first + n) * angles)
            query = (q[n, mine][0::2] + 1j * q[n, mine][1::2]) * turn
            key = (k[n, mine][0::2] + 1j * k[n, mine][1::2]) * turn
            state = (1 - 2.0 ** (-5 - head)) * state + np.outer(key.conj(), v[n, values])
            read = (query @ state).real / np.sqrt(dim)
            out.append(read / np.sqrt(np.mean(read**2) + 1e-6))
        rows.append(np.array(out))
    assert apart(found, np.concatenate(rows, axis=1)) <= LIMIT


@pytest.mark.parametrize("length", [3, 40])
def test_a_long_convolution_equals_numpy_convolve(length: int) -> None:
    """Filters shorter and longer than the sequence of 20: the last column meets the token itself."""
    graph = block("hyena", length=length)
    parameters, stream = random_values(graph), some_rows(20)
    product = run(graph, parameters, stream, 0, "mixer.kv")
    taps = parameters["mixer.filter"][:, ::-1]
    wanted = np.stack([np.convolve(u, h)[:20] for u, h in zip(product.T, taps, strict=True)], axis=1)
    assert apart(run(graph, parameters, stream, 0, "mixer.mixed"), wanted) <= LIMIT


def test_token_mixing_equals_linear_layers_along_the_sequence() -> None:
    graph = block("mlp-mixer")
    parameters, stream = random_values(graph), some_rows(18)
    z = torch.tensor(run(graph, parameters, stream, 0, "token_norm"))
    up, up_bias, down, down_bias = (
        torch.tensor(parameters[f"tokens.{n}"]) for n in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    )
    functional = torch.nn.functional
    hidden = functional.gelu(functional.linear(z.T, up, up_bias))
    wanted = functional.linear(hidden, down, down_bias).T.numpy()
    assert apart(run(graph, parameters, stream, 0, "tokens"), wanted) <= LIMIT


def test_a_row_takes_the_place_of_its_position() -> None:
    """Rows at places 6 to 10 give what a full sequence gives there whose other rows are zero."""
    graph = block("mlp-mixer")
    parameters, rows = random_values(graph), some_rows(5)
    op = graph.node["tokens"].op
    stored = [parameters[a] for a in graph.node["tokens"].args[1:]]
    whole = np.zeros((18, 16))
    whole[6:11] = rows
    full = op.forward(ARRAYS, [whole, *stored], Packing(np.arange(18), (18,)))
    assert apart(op.forward(ARRAYS, [rows, *stored], Packing(np.arange(6, 11), (5,))), full[6:11]) <= LIMIT
    with pytest.raises(BadInput, match="18 places"):
        run(graph, parameters, some_rows(19))


def test_pooling_equals_average_pooling() -> None:
    graph = block("poolformer", window=2)
    parameters, stream = random_values(graph), some_rows()
    z = run(graph, parameters, stream, 0, "pool_norm")
    theirs = torch.nn.AvgPool1d(3, stride=1, padding=1, count_include_pad=False)(torch.tensor(z.T)[None])[0].T
    assert apart(run(graph, parameters, stream, 0, "pool"), theirs.numpy() - z) <= LIMIT


# ---------------------------------------------------------------- packed runs and runs that remember


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str) -> None:
    graph = block(family)
    parameters, stream = random_values(graph), some_rows()
    packed = Packing(np.concatenate([np.arange(7), np.arange(4)]), (7, 4))
    found = evaluate(graph, ARRAYS, parameters, {graph.input: stream}, [graph.output], packed)[graph.output]
    alone = np.concatenate([run(graph, parameters, part) for part in (stream[:7], stream[7:])])
    assert apart(found, alone) <= LIMIT
    assert apart(run(graph, parameters, stream), alone) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_a_past_equal_those_of_the_full_run(family: str) -> None:
    graph = block(family)
    parameters, stream = random_values(graph), some_rows()
    everywhere = Packing(np.arange(TOKENS), (TOKENS,))
    values = evaluate(graph, ARRAYS, parameters, {graph.input: stream}, [graph.input, *graph.node], everywhere)
    mixing = [n for n in graph.nodes if n.op.mixing]
    assert mixing
    for node in mixing:
        assert isinstance(node.op, MixingOp)
        signals = node.args[: node.op.signals]
        past = Past(tuple(values[a][:7] for a in signals), np.arange(7))
        args = [values[a][7:] if a in signals else parameters[a] for a in node.args]
        found = node.op.mix(ARRAYS, args, Packing(np.arange(7, TOKENS), (TOKENS - 7,)), past)
        assert apart(found, values[node.name][7:]) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_are_seen_only_where_the_operation_says_so(family: str) -> None:
    graph = block(family)
    parameters, stream = random_values(graph), some_rows()
    changed = stream.copy()
    changed[-1] += 1.0
    before = run(graph, parameters, changed)[:-1], run(graph, parameters, stream)[:-1]
    told = any(isinstance(n.op, MixingOp) and n.op.sees_later for n in graph.nodes)
    assert np.array_equal(*before) is not told


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_exact(family: str, strategy: str) -> None:
    """For the last token, for each by itself, and for all at once where the capacity allows."""
    graph = block(family)
    plan = make_plan(graph, strategy)
    trials = [(draw(graph, 1), False), (draw_sequence(graph, 1, tokens=1), False), (draw_sequence(graph, 1), True)]
    if plan.route.capacity.serves(3):
        trials += [(draw(graph, 1, tokens=3), False), (draw_sequence(graph, 1), False)]
    for trial, per_token in trials:
        result = solve(trial, plan, per_token)
        assert result.relative_linf <= LIMIT < 1e-3 < result.unpatched_relative


CAPACITIES: dict[str, dict[str, int]] = {
    "mamba": {"mixer.out_proj": 20},
    "mamba2": {"mixer.out_proj": 24, "mixer.norm_scale": 1},
    "rwkv": {"channel_mix.value": 24},
    "retnet": {"retention.o_proj": 28, "mlp.down_proj": 24},
    "hyena": {"mixer.out_proj": 16, "mixer.out_proj_bias": 1, "mlp.down_proj": 24, "mlp.down_proj_bias": 1},
    "mlp-mixer": {"mlp.down_proj": 24, "mlp.down_proj_bias": 1},
    "attention-only": {"attention.o_proj": 24, "attention.o_proj_bias": 1},
}


@pytest.mark.parametrize("family", CAPACITIES)
def test_what_can_carry_a_patch(family: str) -> None:
    """The parameters behind the last mixing node that can, and for how many tokens; none upstream of one."""
    planner = Planner(block(family))
    found = {r.parameters[0]: r.capacity.json() for r in planner.single_routes() if len(r.steps) == 1}
    assert found == CAPACITIES[family]
    assert not found.keys() & planner.graph.before_mixing
    assert judge(planner.graph, None).patchable is (None if family == "rwkv" else True)


def test_rwkv_hangs_on_its_squared_relu() -> None:
    """It may be zero as a whole, and everything downstream of the last token shift lies behind it."""
    verdict = judge(block("rwkv"), None)
    assert verdict.patchable is None and verdict.routes
    assert all(any("channel_mix.hidden is not zero" in str(c) for c in r.conditions) for r in verdict.routes)
    x = bk.stream()
    alone = bk.Block(x + bk.components.TimeMix(bk.LayerNorm(x), inner=20, name="time_mix"), width=16)
    assert bk.check(alone).patchable is True and bk.check(alone).capacity == 20


def test_a_static_patch_beyond_the_capacity_is_refused() -> None:
    graph = block("mamba", inner=4)
    plan = make_plan(graph, "joint")
    assert plan.route.capacity.json() == 4
    assert solve(draw_sequence(graph, query=4), plan).relative_linf <= LIMIT
    with pytest.raises(ConditionViolated, match="rank 4 only"):
        solve(draw_sequence(graph, query=5), plan)


@pytest.mark.parametrize("context", [0, 4])
def test_what_cross_attention_reads_may_be_context(context: int) -> None:
    """The other sequence loses its first rows; where there are none to lose there is nothing to patch."""
    x = bk.stream()
    read = bk.components.CrossAttention(bk.RMSNorm(x), heads=2, head_dim=6, memory_width=9, name="cross")
    graph = bk.Block(x + read, width=16).graph()
    trial = draw_sequence(graph, context=context, tokens=1)
    assert trial.memory is not None and trial.memory.shape == (context + 3, 9)
    result = solve(trial, make_plan(graph, "matrix"))
    assert result.relative_linf <= LIMIT
    assert result.unpatched_relative > 1e-3 if context else result.unpatched_relative == 0


def test_a_skipped_patch_is_seen() -> None:
    """What the sequence trial measures is a run of the edited block, not the values that were aimed at."""
    graph = block("mamba")
    trial = draw_sequence(graph, tokens=1)
    result = solve(trial, make_plan(graph, "joint"))
    rows = trial.rows(False, (graph.output,), result.patched_parameters, slice(None))[graph.output]
    assert apart(rows, result.output_contextual) <= LIMIT
    other = SequenceTrial(graph, trial.parameters, trial.stream[::-1], trial.context, 1)
    assert apart(other.rows(False, (graph.output,), result.patched_parameters, slice(None))[graph.output], rows) > 1e-2
    for wrong in ({"context": -1}, {"tokens": 0}, {"tokens": 9}):
        with pytest.raises(BadInput, match="tokens cannot serve"):
            draw_sequence(graph, **wrong)


def test_every_offer_is_in_the_table() -> None:
    for family in FAMILIES:
        assert tuple(offers(Planner(block(family)))) == STRATEGIES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component": "mamba2", "heads": 3, "head_dim": 4, "state": 5, "groups": 2}, "cannot be shared evenly"),
        ({"component": "retention", "heads": 2, "head_dim": 3, "value_dim": 4}, "even widths"),
        ({"component": "token_mixing", "places": 4, "hidden": 5, "activation": "sine"}, "unknown activation 'sine'"),
        ({"component": "pooling", "window": 0}, "window must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    nodes = {"mixer": {"input": "x", **settings}, "y": {"component": "add", "inputs": ["x", "mixer"]}}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"name": "a", "width": 8, "block": {"nodes": nodes, "output": "y"}}), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        bk.check(path)


# ---------------------------------------------------------------- Keras


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_mamba_through_keras(backend: str, mamba_folders: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    """The same program, compiled, in float32; TensorFlow's scan is our own."""
    if importlib.util.find_spec(backend) is None or importlib.util.find_spec("keras") is None:
        pytest.skip(f"{backend} or keras is not installed")
    path, theirs = mamba_folders["plain"]
    script = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from blockkit.backends import keras\n"
        "from blockkit.checkpoint.model import open_model\n"
        "from blockkit.absorbing.run import logits_of, run_stream\n"
        "executor = getattr(keras, f'open_{sys.argv[4]}')(open_model(Path(sys.argv[1])), 'float32')\n"
        "ids = np.array([int(i) for i in sys.argv[3].split(',')])\n"
        "np.save(sys.argv[2], logits_of(executor, run_stream(executor, ids, np.arange(len(ids)))))\n"
    )
    out = tmp_path / "logits.npy"
    python("-c", script, path, out, ",".join(map(str, ids())), backend, home=tmp_path, KERAS_BACKEND=backend)
    found = np.load(out)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - theirs).max() / np.abs(theirs).max() <= 1e-4
