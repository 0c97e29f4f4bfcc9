# ruff: noqa: E501  (tables of cases)
"""GGUF files of every layout that is read, against `transformers`, which reads the same files or made the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from blockkit.absorbing.executor import reference  # noqa: E402
from blockkit.absorbing.run import logits_of, run_stream  # noqa: E402
from blockkit.checkpoint.gguf_file import convert_gguf  # noqa: E402
from blockkit.checkpoint.model import open_model  # noqa: E402
from blockkit.checkpoint.tokenizer import load_tokenizer  # noqa: E402
from blockkit.errors import BadInput  # noqa: E402

TEXTS = (
    "Hello world", "  two  spaces", "It's 12345 o'clock,\n\n don't\r\n", "naïve café ÅÅ", "e\u0301tude", "",
    "日本語 and 🙂🙂", "tabs\t\tand  \n  lines", "I'LL we'Ve", "x = {a: [1, 22, 333]};",
)  # fmt: skip
COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 8, "tie_word_embeddings": False}),
    "llama tied": ("Llama", {"head_dim": 8, "tie_word_embeddings": True}),
    "llama linear": ("Llama", {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": ("Llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama3 other": ("Llama", {"head_dim": 64, "rope_parameters": {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0,
                               "high_freq_factor": 6.0, "original_max_position_embeddings": 4096}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"tie_word_embeddings": False, "sliding_window": 16}),
    "phi3 partial": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}),
}  # fmt: skip
PRE = {"llama": "llama-bpe", "qwen": "qwen2", "phi3": "smollm", "gemma2": "gpt-2"}


def trained(kind: str) -> Any:
    """A small byte-level BPE tokenizer, cut as the models of that kind cut."""
    from transformers import GPT2TokenizerFast  # noqa: F401  (that there is a fast one)

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pre, bytes_ = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    steps = {
        "llama-bpe": [pre.Split(tokenizers.Regex(words % "{1,3}"), "isolated"), bytes_(False, use_regex=False)],
        "qwen2": [pre.Split(tokenizers.Regex(words % ""), "isolated"), bytes_(False, use_regex=False)],
        "smollm": [pre.Digits(True), bytes_(False)],
        "gpt-2": [bytes_(False)],
    }[kind]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        found.normalizer = tokenizers.normalizers.NFC()
    found.pre_tokenizer, found.decoder = pre.Sequence(steps), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    found.train_from_iterator([t * 3 for t in TEXTS], trainer)
    return found


def model_of(name: str, rows: int) -> Any:
    family, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **settings, vocab_size=rows)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def write(file: Path, name: str, model: Any, tokenizer: Any, keys: Any = lambda w: None) -> Path:
    """The model as a GGUF file, by the names that the package `gguf` has for its tensors."""
    architecture, config = name.split(" ")[0].removesuffix("3" if name.startswith("llama") else ""), model.config
    writer = gguf.GGUFWriter(file, architecture)
    heads, head_dim = (
        config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if head_dim != config.hidden_size // heads or architecture in ("gemma2", "qwen3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] == "linear":
        writer.add_float32(f"{architecture}.rope.scaling.factor", rope["factor"])  # without a type
    add_tokenizer(writer, architecture, tokenizer)
    keys(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.numpy()
        if architecture == "llama" and key.split(".")[-2] in ("q_proj", "k_proj"):
            count = heads if "q_proj" in key else config.num_key_value_heads
            values = values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma2" and "norm" in key:
            values = values + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """As llama.cpp's own converter works them out."""
    found = []
    for i in range(0, head_dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        low, high = (rope["original_max_position_embeddings"] / rope[f"{k}_freq_factor"] for k in ("low", "high"))
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        found.append(
            1.0 if length < high else rope["factor"] if length > low else 1 / ((1 - smooth) / rope["factor"] + smooth)
        )
    return np.array(found, np.float32)


def add_tokenizer(writer: Any, architecture: str, tokenizer: Any) -> None:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next(v for k, v in PRE.items() if architecture.startswith(k)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_gives_the_logits_of_its_model(tmp_path: Path, name: str) -> None:
    architecture = name.split(" ")[0]
    tokenizer = trained(next(v for k, v in PRE.items() if architecture.startswith(k)))
    model = model_of(name, tokenizer.get_vocab_size())
    convert_gguf(write(tmp_path / "m.gguf", name, model, tokenizer), tmp_path / "out")
    opened = open_model(tmp_path / "out")
    ids = np.arange(2, 26)
    executor = reference(opened, "float64")
    ours = logits_of(executor, run_stream(executor, ids, np.arange(len(ids))))
    with torch.no_grad():
        theirs = model.double()(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    bos = [0] if architecture.startswith("llama") else []
    mine = load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert mine.encode(text, special=True) == bos + tokenizer.encode(text).ids, text
        if architecture != "qwen2" and architecture != "qwen3":
            assert mine.decode(mine.encode(text, special=False)) == text


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])  # its Phi-3 needs a vocabulary of 32000
def test_transformers_reads_the_same_file_alike(tmp_path: Path, name: str) -> None:
    tokenizer = trained(next(v for k, v in PRE.items() if name.startswith(k)))
    model = model_of(name, tokenizer.get_vocab_size())
    write(tmp_path / "m.gguf", name, model, tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    mine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = mine.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_how_a_tokenizer_cuts_is_never_guessed(tmp_path: Path) -> None:
    tokenizer = trained("qwen2")
    model = model_of("qwen2", tokenizer.get_vocab_size())

    def other(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.pre")

    write(tmp_path / "m.gguf", "qwen2", model, tokenizer, other)
    with pytest.raises(BadInput, match=r"tokenizer\.ggml\.pre, must be one of.*does not say"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
    ],
)
def test_rope_scaling_as_llama_cpp_reads_it(tmp_path: Path, keys: dict[str, Any], scaling: Any) -> None:
    tokenizer = trained("llama-bpe")

    def add(writer: Any) -> None:
        for key, value in keys.items():
            put = writer.add_string if isinstance(value, str) else writer.add_float32
            put(f"llama.{key}", value)

    write(tmp_path / "m.gguf", "llama", model_of("llama", tokenizer.get_vocab_size()), tokenizer, add)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert open_model(tmp_path / "out").folder.config["rope_scaling"] == scaling


def test_a_part_of_a_split_model_says_so(tmp_path: Path) -> None:
    tokenizer = trained("llama-bpe")

    def split(writer: Any) -> None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 3)

    write(tmp_path / "m-00001-of-00003.gguf", "llama", model_of("llama", tokenizer.get_vocab_size()), tokenizer, split)
    with pytest.raises(BadInput, match=r"part 1 of 3 of a split model.*llama-gguf-split --merge"):
        convert_gguf(tmp_path / "m-00001-of-00003.gguf", tmp_path / "out")
