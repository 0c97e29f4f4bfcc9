"""A tiny random checkpoint of every supported model type, and what a context becomes on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import families
import numpy as np
from families import VOCABULARY, Pair

from blockkit.absorbing import algorithm
from blockkit.absorbing.algorithm import Absorbed
from blockkit.absorbing.executor import reference
from blockkit.absorbing.measure import Reference, measure
from blockkit.absorbing.request import Request
from blockkit.checkpoint.model import Model, open_model

IDS = families.some_ids(12)
POSITIONS = np.arange(len(IDS))
REQUEST = Request(IDS[:8], IDS[8:])

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 10}
NO_HEAD_DIM = {**SMALL, "num_key_value_heads": 2}
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 14}
GEMMA2 = {
    "query_pre_attn_scalar": 14, "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.67}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "n_inner": 40}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 2, "n_head": 6, "seq_length": 64}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 2, "use_bias": True}
GRANITE = {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.4, "embedding_multiplier": 2.5}

# name -> (model type, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT2, "activation_function": "relu"}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}),
    "gpt-neox": ("gpt_neox", {**SMALL, "rope_parameters": PARTIAL}),
    "gpt-neox-sequential": (
        "gpt_neox",
        {**SMALL, "rope_parameters": PARTIAL, "use_parallel_residual": False, "attention_bias": False},
    ),
    "falcon": ("falcon", {**SMALL, "bias": True}),
    "falcon-two-norms": ("falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-grouped": (
        "falcon",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-sequential": ("falcon", {**SMALL, "multi_query": False, "parallel_attn": False, "ffn_hidden_size": 40}),
    "opt": ("opt", {**SMALL, "ffn_dim": 40}),
    "opt-post-norm": ("opt", {**SMALL, "ffn_dim": 40, "do_layer_norm_before": False, "enable_bias": False}),
    "bloom": ("bloom", BLOOM),
    "bloom-post-norm": ("bloom", {**BLOOM, "apply_residual_connection_post_layernorm": True}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": 5}),
    "phi3-partial": ("phi3", {**SMALL, "rope_parameters": PARTIAL}),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 0.3, "tie_word_embeddings": False}),
    "cohere-query-key-norm": ("cohere", {**GROUPED, "logit_scale": 0.3, "use_qk_norm": True, "attention_bias": True}),
    "granite": ("granite", {**GROUPED, **GRANITE, "attention_bias": True, "mlp_bias": True}),
    "bert": ("bert", SMALL),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 9}),
    "mistral-no-window": ("mistral", {**GROUPED, "sliding_window": None, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 5, "sliding_window": 9}),
    "qwen2": ("qwen2", {**NO_HEAD_DIM, **LATE_WINDOW}),
    "qwen3": ("qwen3", {**GROUPED, **LATE_WINDOW}),
    "qwen3-moe": ("qwen3_moe", {**GROUPED, **EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-plain": ("qwen3_moe", {**GROUPED, **EXPERTS, "tie_word_embeddings": True}),
    "gemma": ("gemma", GROUPED),
    "gemma2": ("gemma2", {**GROUPED, **GEMMA2}),
    "olmo": ("olmo", {**NO_HEAD_DIM, "eos_token_id": None, "clip_qkv": 0.7}),
    "olmo-no-clip": ("olmo", {**NO_HEAD_DIM, "eos_token_id": None}),
    "olmo2": ("olmo2", {**NO_HEAD_DIM, "eos_token_id": None}),
    "mamba": ("mamba", MAMBA),
    "llama": ("llama", GROUPED),
    "llama-biases": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "gemma3": ("gemma3_text", {**GROUPED, "num_hidden_layers": 6, "sliding_window": 5}),
}
UNREAD = {"opt": 2 * 24, "opt-post-norm": 2 * 24, "bert": 24}  # padding positions; the second segment's vector


@dataclass
class Family:
    """What the tests need of one case, each made once."""

    name: str
    path: Path

    @cached_property
    def pair(self) -> Pair:
        return families.make(self.path, *CASES[self.name])

    @cached_property
    def model(self) -> Model:
        return open_model(self.pair.path)

    @cached_property
    def theirs(self) -> Any:
        """The class in float32."""
        return families.loaded(CASES[self.name][0], self.pair.path)

    def absorbed(self, strategy: str | None) -> tuple[Absorbed, Reference]:
        executor = reference(self.model, "float32")
        found = algorithm.absorb(executor, REQUEST, strategy)
        return found, measure(executor, found)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape == (len(IDS), VOCABULARY)
    assert np.ptp(theirs) > 0.3, "logits near a constant would be equal whatever the model does"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
