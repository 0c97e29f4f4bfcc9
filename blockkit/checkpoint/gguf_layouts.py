"""What a GGUF model looks like as a Hugging Face checkpoint: its config and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .gguf_header import GgufHeader

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


def layout_of(header: GgufHeader) -> tuple[Config, dict[str, Target]]:
    """Return the model's `config.json` and, for each GGUF tensor name, its target.

    Raises:
        BadInput: the architecture or a feature of it is not supported, a metadata key is missing,
            or tensors are missing, unknown or of the wrong shape.
    """
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise BadInput(
            f"{header.path}: the GGUF architecture {architecture!r} is not supported; allowed are "
            f"{', '.join(_ARCHITECTURES)}. Use the model's Hugging Face folder instead."
        )
    config_of, is_gemma = _ARCHITECTURES[architecture]
    config = _common_config(header, architecture) | config_of(header)
    targets = _targets(config, is_gemma)
    _require_same_tensors(header, targets)
    return config, targets


def _common_config(header: GgufHeader, prefix: str) -> Config:
    def key(name: str, default: Any = None, real: bool = False) -> Any:
        return _metadata(header, f"{prefix}.{name}", default, real)

    def token_id(name: str) -> int | None:
        return header.metadata.get(f"tokenizer.ggml.{name}_token_id")

    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise BadInput(f"{header.path} has no tensor token_embd.weight, so it holds no whole model.")
    heads = key("attention.head_count")
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": key("attention.key_length", key("embedding_length") // heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon", real=True),
        "rope_scaling": _rope_scaling(header, prefix),
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
        "torch_dtype": "float32",
    }
    if config["num_hidden_layers"] > len(header.tensors):
        raise BadInput(f"{header.path}: {key('block_count')} layers are more than it has tensors.")
    if key("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise BadInput(f"{header.path}: keys and values of different sizes are not supported.")
    if key("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise BadInput(f"{header.path}: rotary embedding of a part of each head is not supported.")
    return config


def _llama_config(header: GgufHeader) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": _metadata(header, "llama.rope.freq_base", 10_000.0, real=True),
    }


def _gemma3_config(header: GgufHeader) -> Config:
    layers = _metadata(header, "gemma3.block_count")
    width = _metadata(header, "gemma3.embedding_length")
    heads = _metadata(header, "gemma3.attention.head_count")
    head_dim = _metadata(header, "gemma3.attention.key_length")
    pattern = 6  # five layers with a sliding window, then one without
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": head_dim,
        # The 27B size, the only one with 62 layers, scales its queries by another rule.
        "query_pre_attn_scalar": width // heads if layers == 62 else head_dim,
        "rope_theta": _metadata(header, "gemma3.rope.freq_base", 1_000_000.0, real=True),
        "rope_local_base_freq": 10_000.0,
        "sliding_window": _metadata(header, "gemma3.attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "layer_types": ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)],
        "final_logit_softcapping": header.metadata.get("gemma3.final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }


_ARCHITECTURES: dict[str, tuple[Callable[[GgufHeader], Config], bool]] = {
    "gemma3": (_gemma3_config, True),
    "llama": (_llama_config, False),
}


def _rope_scaling(header: GgufHeader, prefix: str) -> dict[str, Any] | None:
    kind = header.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise BadInput(f"{header.path}: rope scaling {kind!r} is not supported; linear is allowed.")
    return {
        "rope_type": "linear",
        "factor": _metadata(header, f"{prefix}.rope.scaling.factor", real=True),
    }


def _metadata(header: GgufHeader, key: str, default: Any = None, real: bool = False) -> Any:
    """Return a positive whole number (or any positive number, if `real`) from the metadata."""
    value = header.metadata.get(key, default)
    if not isinstance(value, int | float if real else int) or not value > 0:
        wanted = "a positive number" if real else "a positive whole number"
        found = "is missing" if value is None else f"is {value!r:.40}, not {wanted}"
        raise BadInput(f"{header.path}: the metadata {key} {found}; the model cannot be converted.")
    return value


def _targets(config: Config, is_gemma: bool) -> dict[str, Target]:
    """Map each GGUF tensor name to its target.

    Gemma has more norms, stored with one added; Llama has its query and key rows in rotary pairs.
    """
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    added = 1.0 if is_gemma else 0.0
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    paired = {} if is_gemma else heads
    targets = {"token_embd.weight": Target("model.embed_tokens.weight", (vocabulary, width))}
    for layer in range(config["num_hidden_layers"]):
        for (ours, theirs), shape in _layer_matrices(config).items():
            targets[f"blk.{layer}.{ours}.weight"] = Target(
                f"model.layers.{layer}.{theirs}.weight", shape, paired_heads=paired.get(ours, 0)
            )
        for (ours, theirs), size in _layer_norms(config, is_gemma).items():
            targets[f"blk.{layer}.{ours}.weight"] = Target(f"model.layers.{layer}.{theirs}.weight", (size,), added)
    targets["output_norm.weight"] = Target("model.norm.weight", (width,), added)
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = Target("lm_head.weight", (vocabulary, width))
    return targets


def _layer_matrices(config: Config) -> dict[tuple[str, str], tuple[int, int]]:
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    return {
        ("attn_q", "self_attn.q_proj"): (queries, width),
        ("attn_k", "self_attn.k_proj"): (keys, width),
        ("attn_v", "self_attn.v_proj"): (keys, width),
        ("attn_output", "self_attn.o_proj"): (width, queries),
        ("ffn_gate", "mlp.gate_proj"): (inner, width),
        ("ffn_up", "mlp.up_proj"): (inner, width),
        ("ffn_down", "mlp.down_proj"): (width, inner),
    }


def _layer_norms(config: Config, is_gemma: bool) -> dict[tuple[str, str], int]:
    width, head_dim = config["hidden_size"], config["head_dim"]
    if not is_gemma:
        return {
            ("attn_norm", "input_layernorm"): width,
            ("ffn_norm", "post_attention_layernorm"): width,
        }
    return {
        ("attn_norm", "input_layernorm"): width,
        ("attn_q_norm", "self_attn.q_norm"): head_dim,
        ("attn_k_norm", "self_attn.k_norm"): head_dim,
        ("post_attention_norm", "post_attention_layernorm"): width,
        ("ffn_norm", "pre_feedforward_layernorm"): width,
        ("post_ffw_norm", "post_feedforward_layernorm"): width,
    }


def _require_same_tensors(header: GgufHeader, targets: Mapping[str, Target]) -> None:
    missing = [name for name in targets if name not in header.tensors]
    extra = [name for name in header.tensors if name not in targets]
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
    return ", ".join(names[:5]) + more
