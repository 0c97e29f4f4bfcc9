# ruff: noqa: E501  (tables of cases)
"""Every reader of files, with a sound file for each and a way to damage it."""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mutations import as_json, damaged_bytes, damaged_document, damaged_text, damaged_yaml

import blockkit as bk
from blockkit.api import graphs_by_kind
from blockkit.checkpoint.gguf_file import convert_gguf
from blockkit.checkpoint.model import architecture_from_config, open_model
from blockkit.checkpoint.tokenizer import load_tokenizer

CORPUS = Path(__file__).parent / "corpus"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": False, "attention_bias": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    CONFIG,
    {**CONFIG, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4,
     "sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": None, "rope_scaling": None,
     "layer_types": ["sliding_attention", "full_attention"]},
    {"model_type": "gemma3", "text_config": {**CONFIG, "model_type": "gemma3_text", "sliding_window": 8}},
    {**CONFIG, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
    {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": None, "vocab_size": 11, "n_positions": 16,
     "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    {"model_type": "falcon", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 11,
     "layer_norm_epsilon": 1e-5, "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
]  # fmt: skip
SPEC = """\
name: mine
width: 8
context_length: 16
constants: {hidden: 12, eps: 1.0e-5}
components:
  feed:
    inputs: [x]
    settings: {wide: hidden}
    nodes:
      n: {component: rms_norm, input: x, eps: eps}
      m: {component: mlp, input: n, hidden: wide, activation: relu}
    output: m
blocks:
  main:
    nodes:
      norm: {component: rms_norm, input: x, eps: 1e-5}
      a: {component: attention, input: norm, heads: 2, kv_heads: 1, head_dim: 4, rope: {base: 1e4}}
      v: {component: add, inputs: [x, a]}
      f: {component: feed, input: v}
      y: {component: add, inputs: [v, f]}
    output: y
    frozen: ["norm.*"]
layers: {pattern: [main], count: 2}
embedding: {vocabulary: 11}
final:
  nodes: {norm: {component: rms_norm, input: x}}
  output: norm
head: {tied: true}
"""
GRAPH: dict[str, Any] = {"graph": {
    "input": "x", "output": "y", "width": 4,
    "parameters": {"W": {"shape": [4, 6]}, "U": {"shape": [6, 4], "tied": True}, "b": {"shape": [4], "frozen": True}},
    "nodes": {
        "m": {"op": "mix", "args": ["x"]}, "v": {"op": "add", "args": ["x", "m"]},
        "z": {"op": "rms_norm", "args": ["v"], "eps": 1e-6}, "u": {"op": "matmul", "args": ["z", "U"]},
        "h": {"op": "activation", "fn": "tanh", "args": ["u"]}, "w": {"op": "matmul", "args": ["h", "W"]},
        "c": {"op": "softcap", "cap": 3.0, "args": ["w"]}, "s": {"op": "scale", "alpha": 2.0, "args": ["c"]},
        "l": {"op": "slice", "start": 0, "stop": 4, "args": ["s"]}, "y": {"op": "add", "args": ["v", "l", "b"]},
    },
}}  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a", "c", "abc", "<x>"]


@dataclass(frozen=True)
class Reader:
    """Reads one damaged file.

    Attributes:
        make: writes a damaged file into an empty folder.
        read: reads it as the library does; raises a `BlockkitError` or nothing.
    """

    make: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]


# -- safetensors -------------------------------------------------------------------------------------


def shapes() -> dict[str, list[int]]:
    found = {"model.embed_tokens.weight": [11, 8], "lm_head.weight": [11, 8], "model.norm.weight": [8]}
    for layer in range(2):
        for name, shape in (
            ("input_layernorm", [8]), ("post_attention_layernorm", [8]), ("self_attn.q_proj", [8, 8]),
            ("self_attn.k_proj", [4, 8]), ("self_attn.v_proj", [4, 8]), ("self_attn.o_proj", [8, 8]),
            ("mlp.gate_proj", [12, 8]), ("mlp.up_proj", [12, 8]), ("mlp.down_proj", [8, 12]),
        ):  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def header(stored: dict[str, list[int]], metadata: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """A safetensors header of float32 tensors, and their values."""
    found: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, shape in stored.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return found, np.linspace(-1, 1, end // 4, dtype="<f4").tobytes()


def packed(text: str, data: bytes, rng: random.Random) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return damaged_bytes(len(encoded).to_bytes(8, "little") + encoded + data, rng)


def write_weights(folder: Path, rng: random.Random, spoil: bool = True) -> None:
    fields, data = header(shapes())
    text = damaged_text(as_json(damaged_document(fields, rng)), rng) if spoil else as_json(fields)
    content = packed(text, data, rng if spoil else _Still())
    (folder / "model.safetensors").write_bytes(content)


class _Still(random.Random):
    """Damages nothing."""

    def random(self) -> float:
        return 0.0


def make_safetensors(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_text(as_json(CONFIG))
    write_weights(folder, rng)


def make_index(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_text(as_json(CONFIG))
    write_weights(folder, rng, spoil=False)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(shapes(), "a.safetensors")}
    write_text(folder / "model.safetensors.index.json", damaged_text(as_json(damaged_document(index, rng)), rng))


def make_config(folder: Path, rng: random.Random) -> None:
    """A configuration, in half of the cases with the weights of the first of them."""
    config = CONFIG if rng.random() < 0.5 else rng.choice(CONFIGS)
    write_text(folder / "config.json", damaged_text(as_json(damaged_document(config, rng)), rng))
    if rng.random() < 0.5:
        write_weights(folder, rng, spoil=False)


def read_config(folder: Path) -> None:
    architecture = architecture_from_config(folder)
    _ = architecture.graphs
    if (folder / "model.safetensors").exists():
        read_model(folder)


def read_model(folder: Path) -> None:
    model = open_model(folder)
    for slot in model.parts:
        model.parameter(slot)


# -- specs, tokenizers, patches ----------------------------------------------------------------------


def write_text(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def make_spec(folder: Path, rng: random.Random) -> None:
    write_text(folder / "spec.yaml", damaged_yaml(SPEC, rng))


def make_graph(folder: Path, rng: random.Random) -> None:
    write_text(folder / "spec.json", damaged_text(as_json(damaged_document(GRAPH, rng)), rng))


def read_spec(folder: Path) -> None:
    (file,) = folder.iterdir()
    graphs_by_kind(str(file))


def tokenizer_document() -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in enumerate(TOKENS[:3])],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated", "invert": False},
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(TOKENS)}, "merges": [["a", "b"], ["ab", "c"]]},
    }  # fmt: skip


def make_tokenizer(folder: Path, rng: random.Random) -> None:
    text = damaged_text(as_json(damaged_document(tokenizer_document(), rng)), rng)
    write_text(folder / "tokenizer.json", text)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("abc ab\u2581 é<s>", "a" * 30 + "!"):
        tokenizer.decode(tokenizer.encode(text, special=True))


def make_patch(folder: Path, rng: random.Random) -> None:
    facts = {
        "made_for": {"architecture": "llama", "weights": "0" * 64}, "strategy": "stable", "tokens": "last",
        "context_length": 6, "query": [3, 4, 5], "dtype": "float32", "measured": {"linf": 1e-8, "tvd": 0.0},
        "batch": 1, "padding": [], "positions": [6, 7, 8], "transposed": ["layers.0.mlp.down_proj"],
        "tensors": {"layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj.weight"}, "merged": True,
    }  # fmt: skip
    inner = damaged_text(as_json(damaged_document(facts, rng)), rng) if rng.random() < 0.7 else as_json(facts)
    stored = {"layers.0.mlp.down_proj.left": [1, 4], "layers.0.mlp.down_proj.right": [1, 6], "layers.0.n.delta": [4]}
    fields, data = header(stored, {"format": "blockkit-patch 1", "validity": "exact", "patch": inner})
    text = damaged_text(as_json(damaged_document(fields, rng)), rng) if rng.random() < 0.4 else as_json(fields)
    (folder / "patch.safetensors").write_bytes(packed(text, data, rng))


def read_patch(folder: Path) -> None:
    patch = bk.Patch.load(folder / "patch.safetensors")
    _ = patch.validity, patch.position_ids, patch.attention_mask


# -- GGUF --------------------------------------------------------------------------------------------

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GGUF_EVIL = (
    0,
    1,
    -1,
    2,
    3,
    5,
    7,
    2**20,
    2**31,
    2**62,
    0.0,
    -1.5,
    float("nan"),
    float("inf"),
    1e300,
    "",
    "llama",
    "x" * 500,
)


def gguf_fields(kind: str) -> list[list[Any]]:
    """`[key, type, value]`; an array has the type `[9, type]`."""
    fields: list[list[Any]] = [["general.architecture", 8, "llama"]]
    for key, value in (("context_length", 64), ("embedding_length", 8), ("feed_forward_length", 12), ("block_count", 1),
                       ("attention.head_count", 2), ("attention.head_count_kv", 1), ("attention.key_length", 4),
                       ("attention.value_length", 4), ("rope.dimension_count", 4)):  # fmt: skip
        fields.append([f"llama.{key}", 4, value])
    fields += [
        ["llama.attention.layer_norm_rms_epsilon", 6, 1e-5], ["llama.rope.freq_base", 6, 1e4],
        ["llama.rope.scaling.type", 8, "linear"], ["llama.rope.scaling.factor", 6, 2.0],
        ["tokenizer.ggml.model", 8, kind], ["tokenizer.ggml.tokens", [9, 8], TOKENS],
        ["tokenizer.ggml.scores", [9, 6], [-float(i) for i in range(len(TOKENS))]],
        ["tokenizer.ggml.token_type", [9, 5], [2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 4]],
        ["tokenizer.ggml.bos_token_id", 4, 1], ["tokenizer.ggml.eos_token_id", 4, 2],
        ["tokenizer.ggml.unknown_token_id", 4, 0], ["tokenizer.ggml.add_bos_token", 7, True],
        ["tokenizer.ggml.add_space_prefix", 7, False], ["tokenizer.chat_template", 8, "{{x}}"],
        ["general.alignment", 4, 32],
    ]  # fmt: skip
    if kind == "gpt2":
        fields += [["tokenizer.ggml.pre", 8, "qwen2"], ["tokenizer.ggml.merges", [9, 8], ["a b", "ab c"]]]
    return fields


def gguf_tensors() -> list[list[Any]]:
    """`[name, shape, type, offset]`, the shape as it is stored (columns first)."""
    found: list[list[Any]] = [["token_embd.weight", [8, 11]], ["output_norm.weight", [8]], ["output.weight", [8, 11]]]
    for name, shape in (("attn_norm", [8]), ("ffn_norm", [8]), ("attn_q", [8, 8]), ("attn_k", [8, 4]), ("attn_v", [8, 4]),
                        ("attn_output", [8, 8]), ("ffn_gate", [8, 12]), ("ffn_up", [8, 12]), ("ffn_down", [12, 8])):  # fmt: skip
        found.append([f"blk.0.{name}.weight", shape])
    offset = 0
    for tensor in found:
        tensor += [0, offset]
        offset += -(-4 * int(np.prod(tensor[1])) // 32) * 32
    return found


def make_gguf(folder: Path, rng: random.Random) -> None:
    fields, tensors = gguf_fields(rng.choice(("llama", "gpt2"))), gguf_tensors()
    for _ in range(rng.choice((1, 1, 2, 4))):
        spoil_gguf(fields, tensors, rng)
    counts = [len(tensors), len(fields)]
    if rng.random() < 0.05:
        counts[rng.randrange(2)] = rng.choice((0, 10**6, 2**40, 2**64 - 1))
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    for key, kind, value in fields:
        head += text_bytes(key) + value_bytes(kind, value)
    for name, shape, kind, offset in tensors:
        head += text_bytes(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    head += b"\0" * (-len(head) % 32)
    (folder / "m.gguf").write_bytes(damaged_bytes(head + bytes(4096), rng))


def spoil_gguf(fields: list[list[Any]], tensors: list[list[Any]], rng: random.Random) -> None:
    if rng.random() < 0.25:
        tensor = rng.choice(tensors)
        match rng.randrange(4):
            case 0:
                tensor[0] = rng.choice(("", "x" * 200, rng.choice(tensors)[0], "rope_freqs.weight"))
            case 1:
                tensor[1] = [rng.choice((0, 1, 3, 8, 2**31, 2**63)) for _ in range(rng.randrange(6))]
            case 2:
                tensor[2] = rng.choice((0, 1, 2, 8, 12, 30, 999, 2**31))
            case 3:
                tensor[3] = rng.choice((0, 1, 31, 2**31, 2**63))
        return
    i = rng.randrange(len(fields))
    match rng.randrange(6):
        case 0:
            del fields[i]
        case 1:
            fields.append(list(fields[i]))
        case 2 | 3:
            kind = rng.choice([*NUMBERS, 8, 99])
            fields[i][1:] = [kind, rng.choice(GGUF_EVIL)]
        case 4:
            kind = rng.choice([*NUMBERS, 8, 9])
            fields[i][1:] = [[9, kind], [rng.choice(GGUF_EVIL) for _ in range(rng.choice((0, 1, 2, 11)))]]
        case 5:
            fields[i][2] = (
                rng.choice(GGUF_EVIL) if not isinstance(fields[i][1], list) else fields[i][2][: rng.randrange(11)]
            )
    if not fields:
        fields.append(["a", 4, 1])


def text_bytes(text: Any) -> bytes:
    encoded = str(text).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value_bytes(kind: Any, value: Any) -> bytes:
    if isinstance(kind, list):
        inner = b"".join(scalar_bytes(kind[1], v) for v in value)
        return struct.pack("<IIQ", 9, kind[1], len(value)) + inner
    return struct.pack("<I", kind) + scalar_bytes(kind, value)


def scalar_bytes(kind: int, value: Any) -> bytes:
    if kind == 8:
        return text_bytes(value)
    code = NUMBERS.get(kind, "<I")
    number = value if isinstance(value, int | float) else 0
    if code[1] in "fd":
        return (
            struct.pack("<d", float(number))[: struct.calcsize(code)]
            if abs(number) > 3e38
            else struct.pack(code, number)
        )
    whole = int(number) if number == number and abs(number) < 2**63 else 2**62
    return (whole % 2 ** (8 * struct.calcsize(code))).to_bytes(struct.calcsize(code), "little")


def read_gguf(folder: Path) -> None:
    convert_gguf(folder / "m.gguf", folder / "out")


READERS: dict[str, Reader] = {
    "spec": Reader(make_spec, read_spec),
    "graph": Reader(make_graph, read_spec),
    "config": Reader(make_config, read_config),
    "safetensors": Reader(make_safetensors, read_model),
    "index": Reader(make_index, read_model),
    "tokenizer": Reader(make_tokenizer, read_tokenizer),
    "gguf": Reader(make_gguf, read_gguf),
    "patch": Reader(make_patch, read_patch),
}


def read_sample(file: Path) -> None:
    """Reads a file of the corpus by its suffix."""
    if file.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as out:
            convert_gguf(file, Path(out) / "model")
    elif file.suffix == ".st":
        bk.Patch.load(file)
    else:
        graphs_by_kind(str(file))
