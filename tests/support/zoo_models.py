"""Small random models of every causal-LM class of the installed transformers, by rules over their configurations.

A class is built from the settings that its own configuration has; the few that do not fit together by themselves are
in `MORE`. Weights are drawn anew on top of the class's own initial ones, so that none is constant and the context
matters.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
ORDINARY = range(32, VOCABULARY)  # ids that no class uses for a special purpose
Settings = dict[str, Any]

_BY_SIZE: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, """vocab_size decoder_vocab_size vocab_size_per_layer_input
                    encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size"""),
    (32, """hidden_size hidden_size_global d_model n_embd emb_dim embed_dim embedding_size embedding_dim lru_width
            word_embed_proj_dim input_embedding_size output_embedding_size"""),
    (2, """num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers
           num_decoder_layers num_encoder_layers"""),
    (4, """num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads
           decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
           linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads"""),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (16, """head_dim swa_head_dim dim_head kv_channels d_head qk_nope_head_dim v_head_dim
            linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim shape_embed_dim
            pronunciation_embed_dim mamba_d_state state_size ssm_state_size"""),
    (48, """intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size
            shared_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size
            d_ff dff dim_ff d_inner n_inner"""),
    (24, """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
            shared_experts_intermediate_size moe_shared_expert_intermediate_size
            q_lora_rank kv_lora_rank o_lora_rank qk_head_dim"""),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    (1, "n_group topk_group num_expert_group"),
    (8, """qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank
           mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_chunk_size chunk_size"""),
    (8, """sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention
           window_size"""),  # less than a context: it is to matter
    (256, """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
             context_length original_max_position_embeddings model_max_length"""),
    (True, "is_decoder"),
    (False, "tie_word_embeddings"),
)  # fmt: skip
SIZES: Settings = {name: size for size, names in _BY_SIZE for name in names.split()}

# What a class needs besides; names with dots are settings of what is nested.
MORE: Mapping[str, Settings] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {
        "num_hidden_layers": 2, "global_config.encoder_cross_output_size": 64,
        **{f"{part}_config.head_dim": 8 for part in ("patcher", "encoder", "decoder", "global")},
    },
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxForCausalLM": {"attn_config.clip_qkv": 8.0, "attn_config.rope_theta": 1e4},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Gemma4AssistantForCausalLM": {
        "text_config.model_type": "gemma4_text", "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0, "text_config.num_hidden_layers": 2,
        "text_config.num_kv_shared_layers": 2,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "HeliumForCausalLM": {"head_dim": 8},
    "HrmTextForCausalLM": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "MusicgenForCausalLM": {"num_codebooks": 1},  # else a token is several ids
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "ReformerModelWithLMHead": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16],
        "attention_head_size": 8, "hash_seed": 0, "num_buckets": 2,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
    "XLMWithLMHeadModel": {"causal": True},
    "XLNetLMHeadModel": {"d_head": 8, "attn_type": "uni"},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},
}  # fmt: skip

NEEDED = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts")  # set where None is the default
LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "indexer_types")


def classes() -> tuple[str, ...]:
    """The distinct names of causal-LM classes, in order."""
    return tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())))


def build(name: str, seed: int = 0) -> nn.Module:
    """A small model of a class in float32, in evaluation mode, every parameter random.

    Raises:
        Exception: whatever the class itself raises.
    """
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    config = small(_configuration(name, cls), MORE.get(name, {}))
    model = cls(config).float().eval()
    shaken(model, seed)
    return model


def _configuration(name: str, cls: type) -> type[PreTrainedConfig]:
    """The configuration class of a model class: the one it names itself, else the one that the mapping gives."""
    own = getattr(cls, "config_class", None)
    if own is not None:
        return own
    types = [kind for kind, found in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if found == name]
    return CONFIG_MAPPING[types[-1]]


def small(kind: type[PreTrainedConfig], more: Settings) -> PreTrainedConfig:
    """A configuration whose sizes are small; `more` wins, with dots for what is nested."""
    return kind(**_settings(_default(kind, more), more))


def _top(more: Settings) -> Settings:
    return {k: v for k, v in more.items() if "." not in k}


def _settings(default: PreTrainedConfig, more: Settings) -> Settings:
    fields = vars(default)
    found: Settings = {
        n: SIZES[n] for n, v in fields.items() if n in SIZES and (n in NEEDED or isinstance(v, int | float))
    }
    found |= {alias: SIZES[alias] for alias in default.attribute_map if alias in SIZES and alias in _arguments(default)}
    for place, name in enumerate(sorted(n for n in fields if _is_special(n) and isinstance(fields[n], int | list))):
        found[name] = place
    if "qk_rope_head_dim" in found:  # latent attention: every head has keys of its own, and head_dim is what turns
        found |= {k: v for k, v in (("head_dim", found["qk_rope_head_dim"]), ("num_key_value_heads", 4)) if k in fields}
    found |= _layers(default, fields)
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            inner = {k.removeprefix(f"{name}."): v for k, v in more.items() if k.startswith(f"{name}.")}
            found[name] = {**_settings(value, inner), "model_type": value.model_type}
    return found | _top(more)


def _arguments(default: PreTrainedConfig) -> set[str]:
    return set(inspect.signature(type(default).__init__).parameters)


def _default(kind: type[PreTrainedConfig], more: Settings) -> PreTrainedConfig:
    """The class's own default, which for a few classes is none that it would itself accept."""
    try:
        return kind()
    except Exception:
        return kind(**_nested(more))


def _nested(more: Settings) -> Settings:
    """Names with dots as settings of what is nested."""
    found = _top(more)
    for name, value in more.items():
        outer, dot, inner = name.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = value
    return found


def _is_special(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_ids"))


def _layers(default: PreTrainedConfig, fields: Mapping[str, Any]) -> Settings:
    """One layer of each kind, in the order in which the kinds first occur, at least two layers."""
    lists = {n: list(v) for n in LISTS if isinstance(v := fields.get(n), list | tuple) and v}
    if not lists:
        return {}
    length = max(len(v) for v in lists.values())
    kinds = {tuple(v[i % len(v)] for v in lists.values()): i for i in reversed(range(length))}
    places = sorted(kinds.values())
    places = places if len(places) > 1 else places * 2
    found: Settings = {n: [v[i % len(v)] for i in places] for n, v in lists.items()}
    count = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in fields), None)
    return found | ({} if count is None else {count: len(places)})


def shaken(model: nn.Module, seed: int) -> None:
    """Adds noise to every parameter, of the size that keeps a residual stream's scale."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point():
                continue
            scale = 0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
