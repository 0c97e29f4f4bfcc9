"""What a GGUF model looks like as a Hugging Face checkpoint: its config and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .gguf_header import GgufHeader
from .gguf_rope import FACTORS, rope_scaling

Config = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One Hugging Face tensor, and how the values in the GGUF file differ from it.

    Attributes:
        name: the Hugging Face name.
        shape: the shape, the same in both formats.
        added: a constant that GGUF stores added to the values.
        paired_heads: number of heads whose rows GGUF stores in rotary pairs (0: rows as they are).
    """

    name: str
    shape: tuple[int, ...]
    added: float = 0.0
    paired_heads: int = 0


@dataclass(frozen=True)
class Layout:
    """How one GGUF architecture is laid out.

    Attributes:
        config: what its configuration has beside the common part.
        norms: by the GGUF name in a layer: the Hugging Face name, and of what length (a key of the configuration).
        added: a constant that GGUF stores added to the norms.
        paired: whether rows of queries and keys are stored in rotary pairs.
        biased: whether queries, keys and values have biases.
        joined: whether query, key and value are one matrix, and gate and up another.
    """

    config: Callable[[GgufHeader, Config], Config]
    norms: Mapping[str, tuple[str, str]]
    added: float = 0.0
    paired: bool = False
    biased: bool = False
    joined: bool = False


def layout_of(header: GgufHeader) -> tuple[Config, dict[str, Target]]:
    """Return the model's `config.json` and, for each GGUF tensor name, its target.

    Raises:
        BadInput: the architecture or a feature of it is not supported, a metadata key is missing or of another kind,
            or tensors are missing, unknown or of the wrong shape.
    """
    _require_whole(header)
    architecture = header.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise BadInput(
            f"{header.path}: the GGUF architecture {architecture!r:.100} is not supported; allowed are "
            f"{', '.join(_ARCHITECTURES)}. Use the model's Hugging Face folder instead."
        )
    layout = _ARCHITECTURES[architecture]
    common = _common_config(header, architecture)
    config: Config = common | layout.config(header, common)
    targets = _targets(config, layout)
    _require_same_tensors(header, targets)
    return config, targets


def _require_whole(header: GgufHeader) -> None:
    """Refuses one part of a model that was split over several files."""
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        number = header.metadata.get("split.no")
        which = f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts"
        raise BadInput(
            f"{header.path} is {which} of a split model. Join the parts first, with llama.cpp: "
            "llama-gguf-split --merge FIRST_PART JOINED.gguf"
        )


def _common_config(header: GgufHeader, prefix: str) -> Config:
    def whole(name: str, default: int | None = None) -> int:
        return header.whole(f"{prefix}.{name}", default)

    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise BadInput(f"{header.path} has no tensor token_embd.weight, so it holds no whole model.")
    heads, width = whole("attention.head_count"), whole("embedding_length")
    key_heads, head_dim = whole("attention.head_count_kv", heads), whole("attention.key_length", max(width // heads, 1))
    base = header.real(f"{prefix}.rope.freq_base", 10_000.0)
    config: Config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": header.real(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        "rope_scaling": rope_scaling(header, prefix, head_dim, base),
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.token_id("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.token_id("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.token_id("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if config["num_hidden_layers"] > len(header.tensors):
        raise BadInput(f"{header.path}: {config['num_hidden_layers']} layers are more than it has tensors.")
    if head_dim % 2 or heads % key_heads:
        raise BadInput(
            f"{header.path}: {heads} heads of size {head_dim} on {key_heads} key heads: the size must be even, for "
            "rotary positions, and the heads a multiple of the key heads."
        )
    if whole("attention.value_length", head_dim) != head_dim:
        raise BadInput(f"{header.path}: keys and values of different sizes are not supported.")
    if prefix != "phi3" and whole("rope.dimension_count", head_dim) != head_dim:
        raise BadInput(f"{header.path}: rotary embedding of a part of each head is not supported.")
    return config


def _llama_config(header: GgufHeader, common: Config) -> Config:
    if header.real_or_none("llama.expert_count") is not None:
        raise BadInput(f"{header.path}: mixtures of experts are not supported in GGUF files.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
    }


def _qwen_config(model_type: str, name: str) -> Callable[[GgufHeader, Config], Config]:
    def config(header: GgufHeader, common: Config) -> Config:
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": model_type,
            "hidden_act": "silu",
            "use_sliding_window": False,
        }

    return config


def _phi3_config(header: GgufHeader, common: Config) -> Config:
    head_dim, rotary = common["head_dim"], header.whole("phi3.rope.dimension_count", common["head_dim"])
    if rotary > head_dim or rotary % 2:
        raise BadInput(f"{header.path}: rotary positions of {rotary} numbers do not fit heads of size {head_dim}.")
    windowed = header.real_or_none("phi3.attention.sliding_window") is not None
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "partial_rotary_factor": rotary / head_dim,
        "sliding_window": header.whole("phi3.attention.sliding_window") if windowed else None,
        "original_max_position_embeddings": header.whole(
            "phi3.rope.scaling.original_context_length", common["max_position_embeddings"]
        ),
    }


def _gemma_config(prefix: str, largest: int, common: Config, header: GgufHeader) -> Config:
    """What Gemma 2 and 3 share.

    Args:
        largest: the number of layers of the 27B size alone, which scales its queries by another rule.
    """
    width, heads, head_dim = (common[k] for k in ("hidden_size", "num_attention_heads", "head_dim"))
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": header.whole(f"{prefix}.attention.key_length"),
        "query_pre_attn_scalar": width // heads if common["num_hidden_layers"] == largest else head_dim,
        "sliding_window": header.whole(f"{prefix}.attention.sliding_window"),
    }


def _gemma2_config(header: GgufHeader, common: Config) -> Config:
    layers = range(common["num_hidden_layers"])
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_gemma_config("gemma2", 46, common, header),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in layers],
        "final_logit_softcapping": header.real("gemma2.final_logit_softcapping", 30.0),
        "attn_logit_softcapping": header.real("gemma2.attn_logit_softcapping", 50.0),
    }


def _gemma3_config(header: GgufHeader, common: Config) -> Config:
    pattern = 6  # five layers with a sliding window, then one without
    layers = range(common["num_hidden_layers"])
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_gemma_config("gemma3", 62, common, header),
        "rope_theta": header.real("gemma3.rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": pattern,
        "layer_types": ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in layers],
        "final_logit_softcapping": header.real_or_none("gemma3.final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }


_PLAIN = {
    "attn_norm": ("input_layernorm", "hidden_size"),
    "ffn_norm": ("post_attention_layernorm", "hidden_size"),
}
_HEADS = {"attn_q_norm": ("self_attn.q_norm", "head_dim"), "attn_k_norm": ("self_attn.k_norm", "head_dim")}
_SANDWICH = {
    "attn_norm": ("input_layernorm", "hidden_size"),
    "post_attention_norm": ("post_attention_layernorm", "hidden_size"),
    "ffn_norm": ("pre_feedforward_layernorm", "hidden_size"),
    "post_ffw_norm": ("post_feedforward_layernorm", "hidden_size"),
}
_ARCHITECTURES = {
    "gemma2": Layout(_gemma2_config, _SANDWICH, added=1.0),
    "gemma3": Layout(_gemma3_config, _SANDWICH | _HEADS, added=1.0),
    "llama": Layout(_llama_config, _PLAIN, paired=True),
    "phi3": Layout(_phi3_config, _PLAIN, joined=True),
    "qwen2": Layout(_qwen_config("qwen2", "Qwen2"), _PLAIN, biased=True),
    "qwen3": Layout(_qwen_config("qwen3", "Qwen3"), _PLAIN | _HEADS),
}


def _targets(config: Config, layout: Layout) -> dict[str, Target]:
    """Map each GGUF tensor name to its target."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    paired = heads if layout.paired else {}
    matrices = _joined_matrices(config) if layout.joined else _layer_matrices(config)
    targets = {"token_embd.weight": Target("model.embed_tokens.weight", (vocabulary, width))}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for name, (module, shape) in matrices.items():
            targets[f"{ours}{name}.weight"] = Target(f"{theirs}{module}.weight", shape, 0.0, paired.get(name, 0))
            if layout.biased and name in ("attn_q", "attn_k", "attn_v"):
                targets[f"{ours}{name}.bias"] = Target(f"{theirs}{module}.bias", shape[:1])
        for name, (module, size) in layout.norms.items():
            targets[f"{ours}{name}.weight"] = Target(f"{theirs}{module}.weight", (config[size],), layout.added)
    targets["output_norm.weight"] = Target("model.norm.weight", (width,), layout.added)
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = Target("lm_head.weight", (vocabulary, width))
    return targets


def _layer_matrices(config: Config) -> dict[str, tuple[str, tuple[int, int]]]:
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    return {
        "attn_q": ("self_attn.q_proj", (queries, width)),
        "attn_k": ("self_attn.k_proj", (keys, width)),
        "attn_v": ("self_attn.v_proj", (keys, width)),
        "attn_output": ("self_attn.o_proj", (width, queries)),
        "ffn_gate": ("mlp.gate_proj", (inner, width)),
        "ffn_up": ("mlp.up_proj", (inner, width)),
        "ffn_down": ("mlp.down_proj", (width, inner)),
    }


def _joined_matrices(config: Config) -> dict[str, tuple[str, tuple[int, int]]]:
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    return {
        "attn_qkv": ("self_attn.qkv_proj", (queries + 2 * keys, width)),
        "attn_output": ("self_attn.o_proj", (width, queries)),
        "ffn_up": ("mlp.gate_up_proj", (2 * inner, width)),
        "ffn_down": ("mlp.down_proj", (width, inner)),
    }


def _require_same_tensors(header: GgufHeader, targets: Mapping[str, Target]) -> None:
    missing = [name for name in targets if name not in header.tensors]
    extra = [name for name in header.tensors if name not in targets and name != FACTORS]
    misshapen = [
        f"{name} has shape {list(header.tensors[name].shape)} and should have {list(target.shape)}"
        for name, target in targets.items()
        if name in header.tensors and header.tensors[name].shape != target.shape
    ]
    problems = (("missing", missing), ("not supported", extra), ("misshapen", misshapen))
    found = [f"{what}: {_first(names)}" for what, names in problems if names]
    if found:
        raise BadInput(
            f"{header.path}: the tensors are not those of a plain "
            f"{header.metadata['general.architecture']} model. {'; '.join(found)}."
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name:.100}" for name in names[:5]) + more
