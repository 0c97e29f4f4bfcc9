"""GGUF files: the tensors, configuration and tokenizer that went in, or a refusal by name."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from gguf_models import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXTS,
    WIDTH,
    gguf,
    hf_tensors,
    needs_transformers,
    vocabulary,
    write_gguf,
)
from stored import corrupt, leftovers

from blockkit.checkpoint.folder import open_folder
from blockkit.checkpoint.gguf_file import convert_gguf
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BadInput


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gguf_restores_the_original_tensors(tmp_path: Path, architecture: str, tied: bool) -> None:
    stages: list[tuple[str, float]] = []
    out = tmp_path / "out"
    convert_gguf(write_gguf(tmp_path / "m.gguf", architecture, tied), out, lambda s, f: stages.append((s, f)))
    opened, expected = open_folder(out), hf_tensors(architecture, tied)
    assert opened.shapes.keys() == expected.keys()
    for name, values in expected.items():
        assert opened.dtype_of(name) == "F32"
        np.testing.assert_array_equal(opened.tensor(name), values, err_msg=name)
    assert opened.config["tie_word_embeddings"] is tied
    assert opened.config["rms_norm_eps"] == 1e-5
    fractions = [fraction for stage, fraction in stages if stage == "weights"]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert stages[0] == ("tokenizer", 0.0) and ("tokenizer", 1.0) in stages
    assert leftovers(tmp_path) == {"m.gguf", "out"}


@pytest.mark.parametrize("block_type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_block_types_and_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_type: str) -> None:
    monkeypatch.setattr("blockkit.checkpoint.gguf_file._VALUES_AT_ONCE", 3 * WIDTH)
    file = write_gguf(tmp_path / "m.gguf", "gemma3", block_type=block_type)
    convert_gguf(file, tmp_path / "out")
    kind = gguf.GGMLQuantizationType[block_type]
    for name, values in hf_tensors("gemma3", True).items():
        if values.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, kind), kind)
        np.testing.assert_array_equal(open_folder(tmp_path / "out").tensor(name), values)


@needs_transformers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gguf_equals_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", architecture, tied, block_type="Q8_0")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert type(ours) is type(theirs)
    if architecture == "gemma3":  # transformers leaves the scale of another model size here
        assert ours.config.query_pre_attn_scalar == HEAD_DIM
        for layer in theirs.model.layers:
            layer.self_attn.scaling = HEAD_DIM**-0.5
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    for name, values in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], values), name
    ids = torch.arange(60)[None] * 5
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


@needs_transformers
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_small_tokenizer_equals_transformers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoTokenizer

    convert_gguf(write_gguf(tmp_path / "m.gguf", architecture), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours, auto = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXTS, "hello world", " hello  hello\n\nreturn (a, b)<b>x"]:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == expected, text
            assert auto.encode(text, add_special_tokens=special) == expected, text
            assert ours.decode(expected) == theirs.decode(expected)
    for role in ("bos_token", "eos_token", "unk_token"):
        assert getattr(auto, role) == getattr(theirs, role)


def test_gemma_config_follows_the_metadata(tmp_path: Path) -> None:
    def keys(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    convert_gguf(write_gguf(tmp_path / "m.gguf", "gemma3", keys=keys), tmp_path / "out")
    config = open_folder(tmp_path / "out").config
    expected = {
        "model_type": "gemma3_text",
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "rope_theta": 50_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * LAYERS,
        "max_position_embeddings": 128,
        "vocab_size": len(vocabulary("gemma3")[0]),
        "pad_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected


def test_gemma_27b_has_its_own_query_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_models, "LAYERS", 62)
    convert_gguf(write_gguf(tmp_path / "m.gguf", "gemma3"), tmp_path / "out")
    config = open_folder(tmp_path / "out").config
    assert config["query_pre_attn_scalar"] == WIDTH // HEADS != HEAD_DIM
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17, 23, 29, 35, 41, 47, 53, 59] and len(config["layer_types"]) == 62


def test_llama_without_key_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_models, "HEAD_DIM", WIDTH // HEADS)
    convert_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    opened = open_folder(tmp_path / "out")
    assert opened.config["head_dim"] == WIDTH // HEADS and opened.config["rope_scaling"] is None
    for name, values in hf_tensors("llama", True).items():
        np.testing.assert_array_equal(opened.tensor(name), values)


# ---------------------------------------------------------------- GGUF files that are refused


def _drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def _set(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer.ggml.pre"),
        ({"tokenizer": "bert"}, "kind 'bert'; 'llama'"),
        ({"edit": _drop("blk.1.ffn_up.weight")}, r"missing: blk\.1\.ffn_up\.weight"),
        ({"edit": _drop("token_embd.weight")}, r"no tensor token_embd\.weight"),
        ({"edit": _set("blk.0.attn_q.bias", 64)}, r"not supported: blk\.0\.attn_q\.bias"),
        ({"edit": _set("blk.0.attn_k.weight", 16, 64)}, r"misshapen: .*\[16, 64\].*\[64, 64\]"),
        ({"edit": _set("token_embd.weight", 9, 64)}, "tokens.*at most 9"),
        ({"keys": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "'yarn'"),
        ({"keys": lambda w: w.add_key_length(16)}, "sizes|part of each head"),
        ({"architecture": "gemma3", "keys": lambda w: w.add_block_count(10**9)}, "layers"),
        ({"keys": lambda w: w.add_float32("llama.block_count", 2.0)}, "block_count is 2.0, not a"),
        ({"keys": lambda w: w.add_block_count(0)}, "block_count is 0, not a positive"),
        ({"keys": lambda w: w.add_bos_token_id(10**6)}, "bos token id 1000000"),
    ],
)
def test_unsupported_gguf_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(BadInput, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert leftovers(tmp_path) == {"m.gguf"}


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    corrupt(file, b"\x05\0\0\0\0\0\0\0llama\x11", b"\x05\0\0\0\0\0\0\0qwenX\x11")
    with pytest.raises(BadInput, match="'qwenX' is not supported; allowed are gemma2, gemma3, llama"):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("wrong", [0, 65])
def test_shape_that_is_not_whole_blocks_is_refused(tmp_path: Path, wrong: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", block_type="Q8_0")
    name = b"blk.0.attn_q.weight" + struct.pack("<I", 2)
    corrupt(file, name + struct.pack("<Q", 64), name + struct.pack("<Q", wrong))
    with pytest.raises(BadInput, match=r"'blk.0.attn_q.weight' has shape .*blocks of 32"):
        convert_gguf(file, tmp_path / "out")


def test_block_type_without_a_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: np.ndarray, kind: object) -> np.ndarray:
        raise NotImplementedError

    file = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(BadInput, match="stored as F32, which the package gguf cannot read"):
        convert_gguf(file, tmp_path / "out")


def test_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut, out = tmp_path / "cut.gguf", tmp_path / "out"
    for size in [4, 8, 20, 30, *range(50, 9000, 487), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(BadInput, match="is truncated"):
            convert_gguf(cut, out)
        assert not out.exists()


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    rng = np.random.default_rng(0)
    header = whole.index(b"blk.1.attn_norm") + 500
    refused = converted = 0
    for attempt in range(80):
        damaged = whole.copy()
        damaged[int(rng.integers(0, header))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            convert_gguf(tmp_path / "d.gguf", tmp_path / f"out{attempt}")
        except BadInput:
            refused += 1
        else:
            converted += 1
    assert refused > 10 and converted > 10


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "does not start with 'GGUF'"),
        (b"GGML\x03\0\0\0", "does not start with 'GGUF'"),
        (b"GGUF\x01\0\0\0", "version 1;.*versions 2 and 3"),
        (b"GGUF\0\0\0\x03", "big-endian"),
    ],
)
def test_foreign_file_is_refused(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(BadInput, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(BadInput, match="cannot read"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out")


@pytest.mark.parametrize("moment", [("tokenizer", 0.0), ("tokenizer", 1.0), ("weights", 1.0)])
def test_interrupted_conversion_leaves_nothing(tmp_path: Path, moment: tuple[str, float]) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if (stage, fraction) == moment:
            raise KeyboardInterrupt

    file = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file, tmp_path / "out", interrupt)
    assert leftovers(tmp_path) == {"m.gguf"}
