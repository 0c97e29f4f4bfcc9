"""The attention of transformers' own classes against the component's, setting by setting, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attention_checks as checks
import numpy as np
import pytest

from blockkit.graph.mixers.rotary import Rope
from blockkit.graph.mixers.scoring import RelativeBias, alibi_slopes
from blockkit.graph.sizes import Size

LIMIT, TOKENS = 1e-12, 40
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model with one layer of a family, and where its attention is.

    Attributes:
        model_type, settings: of its configuration.
        kind: in `attention_checks.KINDS`.
        module: the attention's path in the model.
        weights: its tensors as the component's parameters.
        encoder: it has an encoder and a decoder.
        adds: its attention's result includes the residual, which is its second argument.
        by: which of transformers' implementations: Falcon's `eager` one counts ALiBi twice.
    """

    model_type: str
    settings: dict[str, Any]
    kind: str
    module: str
    weights: Callable[[State], State]
    encoder: bool = False
    adds: bool = False
    by: str = "eager"


def renamed(**names: str) -> Callable[[State], State]:
    """Parameters by the tensors' names; `q_proj` and so on have their own."""
    own = {f"{p}_proj": f"{p}_proj" for p in "qkvo"}

    def weights(state: State) -> State:
        found = {}
        for slot, name in {**own, **names}.items():
            if f"{name}.weight" in state:
                found[slot] = state[f"{name}.weight"]
            if f"{name}.bias" in state:
                found[f"{slot}_bias"] = state[f"{name}.bias"]
        return found | ({"sinks": state["sinks"]} if "sinks" in state else {})

    return weights


def by_thirds(fused: str, out: str, heads: int | None, **names: str) -> Callable[[State], State]:
    """One matrix for q, k and v: three blocks, or (with `heads`) three blocks for each head."""

    def weights(state: State) -> State:
        found = renamed(o_proj=out, **names)(state)
        for what in ("weight", "bias"):
            if (value := state.get(f"{fused}.{what}")) is not None:
                parts = np.moveaxis(value.reshape(heads or 1, 3, -1, *value.shape[1:]), 1, 0)
                slots = [f"{p}_proj" + ("_bias" if what == "bias" else "") for p in "qkv"]
                found |= {s: p.reshape(-1, *value.shape[1:]) for s, p in zip(slots, parts, strict=True)}
        return found

    return weights


def falcon(state: State) -> State:
    """All heads' queries, then the one key, then the one value."""
    ends = {"q_proj": slice(0, 32), "k_proj": slice(32, 40), "v_proj": slice(40, 48)}
    found = {slot: state["query_key_value.weight"][rows] for slot, rows in ends.items()}
    found |= {f"{slot}_bias": state["query_key_value.bias"][rows] for slot, rows in ends.items()}
    return found | {"o_proj": state["dense.weight"], "o_proj_bias": state["dense.bias"]}


def per_head(state: State) -> State:
    """Cohere holds the scales of its norms as `[heads, head_dim]`."""
    found = renamed(q_norm="q_norm", k_norm="k_norm")(state)
    return {name: value.reshape(-1) if name.endswith("norm") else value for name, value in found.items()}


COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
          "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 2.0, "beta_slow": 0.5}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
DEEPSEEK = {
    **COMMON, "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 14, "kv_lora_rank": 12,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}  # fmt: skip
BART = {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "max_position_embeddings": 64}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0,
           "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

LATENT = renamed(q_a_proj="q_a_proj", q_b_proj="q_b_proj", kv_a_proj="kv_a_proj_with_mqa", kv_b_proj="kv_b_proj",
                 q_a_norm="q_a_layernorm", kv_a_norm="kv_a_layernorm")  # fmt: skip
T5_NAMES = renamed(q_proj="q", k_proj="k", v_proj="v", o_proj="o", rel_bias="relative_attention_bias")

CASES: dict[str, Case] = {
    "gpt-neox": Case(
        "gpt_neox", {**COMMON, "rotary_pct": 0.5}, "partial-rope", "layers.0.attention",
        by_thirds("query_key_value", "dense", 4)),
    "gpt-j": Case(
        "gptj", {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
        "interleaved-rope", "h.0.attn", renamed(o_proj="out_proj")),
    "cohere": Case(
        "cohere", {**GROUPED, "use_qk_norm": True, "layer_norm_eps": 1e-5, "pad_token_id": 0,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "per-head-norm",
        "layers.0.self_attn", per_head),
    "olmo2": Case(
        "olmo2", {**GROUPED, "rms_norm_eps": 1e-6, "pad_token_id": 0}, "norm-over-all", "layers.0.self_attn",
        renamed(q_norm="q_norm", k_norm="k_norm")),
    "persimmon": Case(
        "persimmon", {**COMMON, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, "shared-norm-bias",
        "layers.0.self_attn", by_thirds("query_key_value", "dense", 4, q_norm="q_layernorm", k_norm="k_layernorm")),
    "qwen2": Case("qwen2", GROUPED, "qkv-bias", "layers.0.self_attn", renamed()),
    "bloom": Case(
        "bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "alibi", "h.0.self_attention",
        by_thirds("query_key_value", "dense", 4), adds=True),
    "falcon": Case(
        "falcon", {**COMMON, "alibi": True, "multi_query": True, "new_decoder_architecture": False, "bias": True,
                   "parallel_attn": False}, "alibi-scaled", "h.0.self_attention", falcon, by="sdpa"),
    "mpt": Case(
        "mpt", {"vocab_size": 61, "d_model": 48, "n_layers": 1, "n_heads": 6, "max_seq_len": 64,
                "attn_config": {"clip_qkv": 0.5}}, "alibi-clip", "blocks.0.attn", by_thirds("Wqkv", "out_proj", None)),
    "t5-encoder": Case("t5", T5, "relative-bias-both-ways", "encoder.block.0.layer.0.SelfAttention", T5_NAMES, True),
    "t5-decoder": Case("t5", T5, "relative-bias", "decoder.block.0.layer.0.SelfAttention", T5_NAMES, True),
    "t5-cross": Case("t5", T5, "t5-cross", "decoder.block.0.layer.1.EncDecAttention", T5_NAMES, True),
    "bart-cross": Case(
        "bart", BART, "bart-cross", "decoder.layers.0.encoder_attn", renamed(o_proj="out_proj"), True),
    "bart-encoder": Case(
        "bart", BART, "all-biases-both-ways", "encoder.layers.0.self_attn", renamed(o_proj="out_proj"), True),
    "gpt-oss": Case(
        "gpt_oss", {**GROUPED, "head_dim": 6, "attention_bias": True, "sliding_window": 5, "num_local_experts": 2,
                    "num_experts_per_tok": 1, "layer_types": ["sliding_attention"],
                    "rope_parameters": {**YARN, "truncate": False}}, "sinks", "layers.0.self_attn", renamed()),
    "llama3-rope": Case(
        "llama", {**GROUPED, "rope_parameters": LLAMA3}, "llama3-rope", "layers.0.self_attn", renamed()),
    "yarn-rope": Case("llama", {**GROUPED, "rope_parameters": YARN}, "yarn-rope", "layers.0.self_attn", renamed()),
    "deepseek-v3": Case(
        "deepseek_v3", {**DEEPSEEK, "rope_parameters": YARN}, "deepseek", "layers.0.self_attn", LATENT),
    "deepseek-v3-mscale": Case(
        "deepseek_v3", {**DEEPSEEK, "q_lora_rank": None,
                        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "deepseek-mscale", "layers.0.self_attn", LATENT),
}  # fmt: skip

GROWN = 0.1 * math.log(4) + 1  # yarn's amplitude for a factor of 4
# kinds that only a comparison needs: they repeat others with a family's own numbers
FAMILY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-cross": ("cross_attention", {"scale": 1.0}),
    "bart-cross": ("cross_attention", {"bias": True}),
    "all-biases-both-ways": ("attention", {"bias": True, "causal": False}),
    "deepseek": ("latent_attention", {
        **checks.LATENT, "q_rank": 14, "rope": {**checks.YARN, "interleaved": True}}),
    "deepseek-mscale": ("latent_attention", {
        **checks.LATENT, "scale": 10**-0.5 * GROWN**2,
        "rope": {**checks.YARN, "interleaved": True, "attention_factor": 1.0}}),
}  # fmt: skip


@pytest.fixture
def family_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in FAMILY_KINDS.items():
        monkeypatch.setitem(checks.KINDS, name, kind)


def observed(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    """The attention module of a random one-layer model, and what went in and out of it in a run."""
    families = pytest.importorskip("families")
    import torch
    import transformers

    config = transformers.CONFIG_MAPPING[case.model_type](**case.settings)
    generator, seen = torch.Generator().manual_seed(3), {}

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen["x"] = (args[0] if args else kwargs["hidden_states"])[0].numpy()
        seen["y"] = (out[0] - args[1] if case.adds else out[0])[0].numpy()
        memory = kwargs.get("key_value_states")
        seen["memory"] = seen["x"] if memory is None else memory[0].numpy()

    with families.in_float64():
        model = transformers.AutoModel.from_config(config, attn_implementation=case.by, experts_implementation="eager")
        for p in model.eval().parameters():
            scale = 0.5 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_((0.5 if p.ndim == 1 else 0) + scale * torch.randn(p.shape, generator=generator))
        module = model.get_submodule(case.module)
        module.register_forward_hook(hook, with_kwargs=True)
        ids = torch.randint(3, 61, (1, TOKENS), generator=generator)
        given = {"input_ids": ids[:, :23], "decoder_input_ids": ids} if case.encoder else {"input_ids": ids}
        model(**given, use_cache=False)
    return module, seen


@pytest.mark.usefixtures("family_kinds")
@pytest.mark.parametrize("name", CASES)
def test_same_as_transformers(name: str) -> None:
    case = CASES[name]
    module, seen = observed(case)
    state = {n: v.detach().numpy() for n, v in module.state_dict().items()}
    given = case.weights(state)
    graph = checks.block_of(case.kind, seen["x"].shape[1])
    assert {p.name.partition(".")[2] for p in graph.parameters} == given.keys()
    parameters = {f"attention.{slot}": value for slot, value in given.items()}
    ours = checks.alone(graph, parameters, seen["x"], np.arange(len(seen["x"])), seen["memory"])
    assert np.abs(seen["y"]).max() > 0.3, "results near zero would be equal whatever the block does"
    difference = float(np.abs(ours - seen["y"]).max())
    print(f"\n{name}: {difference:.3g}")
    assert difference <= LIMIT


def rope_case(kind: str, changed: dict[str, Any]) -> tuple[Rope, Any]:
    import transformers

    ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    given = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
             **ends, **changed}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=1, head_dim=32, rope_parameters=given)
    ours = {k: v for k, v in given.items() if k in Rope.__dataclass_fields__}
    return Rope(kind=kind, original_length=64, **ours), config  # type: ignore[arg-type]


ROPES = [
    ("llama3", {}), ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 9.0}), ("yarn", {}),
    ("yarn", {"truncate": False}), ("yarn", {"beta_fast": 4.0, "beta_slow": 0.25}),
    ("yarn", {"attention_factor": 0.7}), ("yarn", {"factor": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changed"), ROPES)
def test_rope_tables_are_those_of_transformers(kind: str, changed: dict[str, Any]) -> None:
    families = pytest.importorskip("families")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, config = rope_case(kind, changed)
    with families.in_float64():
        wanted, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert rope.frequencies(32, "float64") == pytest.approx(wanted.numpy(), rel=1e-12)
    assert rope.amplitude() == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 256), (16, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_of_distances_are_those_of_t5(causal: bool, buckets: int, furthest: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-furthest, furthest + 1)
    wanted = T5Attention._relative_position_bucket(offsets, not causal, buckets, furthest).numpy()
    assert np.array_equal(RelativeBias(Size.of(buckets), Size.of(furthest)).table(causal), wanted)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32])
def test_slopes_are_those_of_mpt_and_bloom(heads: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0].numpy()
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1].numpy()
    assert alibi_slopes(heads) == pytest.approx(mpt, rel=1e-6)
    assert alibi_slopes(heads) == pytest.approx(bloom, rel=1e-6)
