# ruff: noqa: E501  (tables of cases)
"""A small Llama checkpoint with a tokenizer, made without any framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, INNER, HEADS, KEYS, SIZE, LAYERS, ROWS = 24, 40, 4, 2, 6, 2, 20
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "head_dim": SIZE, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "vocab_size": ROWS, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 64, "rope_theta": 1e4,
    "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TEXTS = ("--context", "w1 w2 w3 w4", "--query", "w5 w6")


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH), "lm_head.weight": (ROWS, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (HEADS * SIZE, WIDTH)), ("self_attn.k_proj", (KEYS * SIZE, WIDTH)),
            ("self_attn.v_proj", (KEYS * SIZE, WIDTH)), ("self_attn.o_proj", (WIDTH, HEADS * SIZE)),
            ("mlp.gate_proj", (INNER, WIDTH)), ("mlp.up_proj", (INNER, WIDTH)), ("mlp.down_proj", (WIDTH, INNER)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    found = {name: (rng.normal(size=s) / s[-1] ** 0.5).astype(np.float32) for name, s in shapes.items()}
    norms = ["model.norm"] + [
        f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    return found | {f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}


def tokenizer() -> dict[str, Any]:
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(ROWS - 3))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "added_tokens": [{"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(3)],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip


def write_model(folder: Path, config: dict[str, Any] | None = None, extra: dict[str, np.ndarray] | None = None) -> Path:
    """The checkpoint, with other settings or tensors; None takes a setting away."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in {**CONFIG, **(config or {})}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    save_file({**tensors(), **(extra or {})}, folder / "model.safetensors")
    return folder
