# ruff: noqa: E501  (tables of cases)
"""Checkpoints that are damaged, hostile, foreign or far too large: one message, after bounded work; foreign state obeyed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from operations import counted
from small_model import CONFIG, INNER, LAYERS, ROWS, WIDTH, tokenizer, write_model

from blockkit.absorbing.executor import reference
from blockkit.absorbing.run import logits_of, run_stream
from blockkit.checkpoint.folder import open_folder, write_folder
from blockkit.checkpoint.model import architecture_from_config, open_model
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BadInput
from blockkit.json_reader import DEEPEST, MOST_DIGITS, NotJson, parse_json

MOST_CALLS = 90_000_000  # some ten seconds of an idle machine


def refused(read: Callable[[], object], *wanted: str) -> str:
    with pytest.raises(BadInput) as raised, counted() as work:
        read()
    assert work.calls < MOST_CALLS
    message = str(raised.value)
    assert len(message) < 3000 and all(w in message for w in wanted), message
    return message


# -- JSON --------------------------------------------------------------------------------------------

DOCUMENTS: dict[str, tuple[str, str]] = {
    "deep list": ("[" * 10**5, "nested too deeply"),
    "deep object": ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
    "digits": ('{"a": ' + "1" * 5000 + "}", "5,000 digits"),
    "negative digits": ('{"a": -' + "1" * 200 + "}", "200 digits"),
    "infinite": ('{"a": [1e999]}', "inf is not a finite"),
    "named infinite": ('{"a": -Infinity}', "-inf is not a finite"),
    "no number": ('{"a": NaN}', "nan is not a finite"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
    "many": ("[" + "0," * 4_000_000 + "0]", "more than 3,000,000 values"),
    "many lists": ("[" + "[]," * 4_000_000 + "[]]", "more than 3,000,000 values"),
    "large": ('"' + "x" * (40 << 20) + '"', "larger than 32 MiB"),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_json_is_read_within_bounds(what: str) -> None:
    text, wanted = DOCUMENTS[what]
    refused(lambda: parse_json(text, "file"), "file", wanted)


def test_json_up_to_the_bounds_is_read() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "file") is not None
    assert parse_json("1" * MOST_DIGITS, "file") == int("1" * MOST_DIGITS)
    assert parse_json('{"a": "' + "1" * 5000 + '", "b": 12}', "file")["b"] == 12
    assert parse_json("[NaN, 1e999]", "file", finite=False)[1] == float("inf")
    with pytest.raises(NotJson, match="line 2, column 1"):
        parse_json('{"a": 1\n', "file")


# -- counts ------------------------------------------------------------------------------------------


def with_header(folder: Path, header: str) -> Path:
    """The checkpoint with another header, as long as need be, and its values."""
    text = header.encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    return folder


ENTRY = '"%s":{"dtype":"F32","shape":%s,"data_offsets":[0,0]}'
HEADERS: dict[str, Callable[[], str]] = {
    "many large axes": lambda: "{" + ENTRY % ("a", [10**11] * 1_000_000) + "}",
    "many axes": lambda: "{" + ENTRY % ("a", "[" + "1," * 2_500_000 + "0]") + "}",
    "many tensors": lambda: "{" + ",".join(ENTRY % (f"model.layers.{i}.x", [0]) for i in range(150_000)) + "}",
    "long names": lambda: "{" + ENTRY % ("x" * 10**7, [0]) + "}",
    "infinite axis": lambda: "{" + ENTRY % ("a", "[1e999]") + "}",
    "real axis": lambda: "{" + ENTRY % ("a", "[0.0]") + "}",
    "true axis": lambda: "{" + ENTRY % ("a", "[false]") + "}",
    "axes that are a text": lambda: "{" + ENTRY % ("a", '"00"') + "}",
    "one entry twice": lambda: "{" + ENTRY % ("a", [0]) + "," + ENTRY % ("a", [0]) + "}",
    "shared bytes": lambda: '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
    "offsets of many digits": lambda: '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,' + "9" * 4300 + "]}}",
    "deep": lambda: '{"a":' + "[" * 2000 + "]" * 2000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_is_bounded(tmp_path: Path, what: str) -> None:
    write_model(tmp_path)
    refused(lambda: open_model(with_header(tmp_path, HEADERS[what]())), str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**7}, {"num_hidden_layers": 10**17}, {"num_hidden_layers": LAYERS + 1},
        {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
        {"num_attention_heads": 10**15}, {"hidden_size": 10**17}, {"vocab_size": 10**17}, {"vocab_size": 0},
        {"num_hidden_layers": float("inf")}, {"num_hidden_layers": float("nan")}, {"num_hidden_layers": 2.5},
        {"num_hidden_layers": True}, {"num_hidden_layers": "2"}, {"head_dim": -6}, {"rope_theta": float("nan")},
        {"rms_norm_eps": "x"}, {"rope_scaling": {"rope_type": ["linear"]}}, {"hidden_act": {}}, {"layer_types": [[]]},
    ],
)  # fmt: skip
def test_a_configuration_cannot_ask_for_more_than_is_there(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings in ({"layer_types": [[]]}, {"num_hidden_layers": True}):
        pytest.skip("Llama has no layer types; true is one layer")
    write_model(tmp_path, settings)
    refused(lambda: open_model(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("shard", "wanted"),
    [
        ("a" * 300, "which is not in"), ("../model.safetensors", "which is not in"), ("", "which is not in"),
        ("/etc/passwd", "which is not in"), (7, "which is not in"), (["a"], "which is not in"), ("a\0b", "which is not in"),
        ("pytorch_model.bin", "only .safetensors files are read"),
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it(tmp_path: Path, shard: Any, wanted: str) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(lambda: open_model(tmp_path), str(index), wanted)


# -- foreign state -----------------------------------------------------------------------------------


def logits(folder: Path) -> np.ndarray:
    executor = reference(open_model(folder), "float64")
    ids = np.arange(3, 15)
    return logits_of(executor, run_stream(executor, ids, np.arange(len(ids))))


def test_a_missing_number_of_key_heads_is_that_of_all_heads(tmp_path: Path) -> None:
    k = {f"model.layers.{i}.self_attn.{n}_proj.weight": np.full((24, WIDTH), 0.1, np.float32) for i in range(LAYERS) for n in "kv"}  # fmt: skip
    for name, value in (("null", None), ("absent", ...)):
        write_model(tmp_path / name, {"num_key_value_heads": value}, k)
    write_model(tmp_path / "said", {"num_key_value_heads": CONFIG["num_attention_heads"]}, k)
    for name in ("null", "absent"):
        assert np.array_equal(logits(tmp_path / name), logits(tmp_path / "said"))


def test_buffers_of_rotary_positions_are_left_out(tmp_path: Path) -> None:
    write_model(tmp_path / "plain")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(LAYERS)}
    write_model(tmp_path / "old", None, buffers)
    assert np.array_equal(logits(tmp_path / "plain"), logits(tmp_path / "old"))
    write_model(tmp_path / "other", None, {"model.layers.0.self_attn.strange": np.ones(3, np.float32)})
    refused(lambda: open_model(tmp_path / "other"), "model.layers.0.self_attn.strange is not part of")


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2"])
def test_a_stored_head_wins_over_the_configuration(tmp_path: Path, family: str) -> None:
    """As in `transformers` 5, which does not tie what is stored apart."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = {"llama": "Llama", "gemma": "Gemma", "gemma2": "Gemma2"}[family]
    sizes = {k: CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size")}
    config = getattr(transformers, f"{theirs}Config")(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **({"query_pre_attn_scalar": 6} if family == "gemma2" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{theirs}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "tie_word_embeddings": True}))
    ids = np.arange(3, 15)
    with torch.no_grad():
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        wanted = read(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(logits(tmp_path) - wanted).max() < 1e-6 * np.abs(wanted).max()
    save_file({**load_file(tmp_path / "model.safetensors"), "lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")  # fmt: skip
    assert open_model(tmp_path).architecture.tied  # what is stored alike stays tied


@pytest.mark.parametrize("caps", [(None, None), (None, 30.0), (50.0, None), (50.0, 30.0), (..., ...)])
def test_gemma_2_with_and_without_soft_caps(tmp_path: Path, caps: tuple[Any, Any]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=ROWS, max_position_embeddings=64, query_pre_attn_scalar=1, pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 100
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for key, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True):
        stored.pop(key) if cap is ... else stored.update({key: cap})
    (tmp_path / "config.json").write_text(json.dumps(stored))
    ids = np.arange(3, 15)
    with torch.no_grad():
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float64, attn_implementation="eager"
        )
        wanted = read.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(logits(tmp_path) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_language_model_inside_another_model(tmp_path: Path, layout: str) -> None:
    """Gemma 3 with images: its texts are run by the language model inside, whose class's defaults are not written."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = {"model_type": "gemma3_text", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "sliding_window": 8, "vocab_size": ROWS, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    torch.manual_seed(0)
    inner = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text, pad_token_id=None))
    prefix = {"new": "model.language_model.", "old": "language_model.model."}[layout]
    tensors = {
        prefix + k.removeprefix("model."): v.numpy() for k, v in inner.state_dict().items() if k != "lm_head.weight"
    }
    vision = {"new": "model.vision_tower.x.weight", "old": "vision_tower.x.weight"}[layout]
    save_file({**tensors, vision: np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    ids = np.arange(3, 15)
    with torch.no_grad():
        wanted = inner.double().eval()(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(logits(tmp_path) - wanted).max() < 1e-6 * np.abs(wanted).max()
    assert architecture_from_config(tmp_path).name == "gemma3"
    del tensors[f"{prefix}norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    refused(lambda: open_model(tmp_path), "norm.weight is missing")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8, e4m3"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4"),
        ({"quant_method": ["x"]}, "['x']"),
        ("yes", "by no named method"),
    ],
)
def test_a_quantised_folder_says_how(tmp_path: Path, how: Any, said: str) -> None:
    write_model(tmp_path, {"quantization_config": how})
    refused(lambda: open_model(tmp_path), "is quantised", said)


# -- tokenizers --------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer(), **changed}))
    return folder


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    kept = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<s>"},
    }  # fmt: skip
    text = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    plain, foreign = (load_tokenizer(with_tokenizer(tmp_path / n, **c)) for n, c in (("a", {}), ("b", kept)))
    assert (
        foreign.encode(text, special=True) == plain.encode(text, special=True) and len(plain.encode(text, True)) == 10
    )


def test_a_text_that_begins_with_bos_has_one(tmp_path: Path) -> None:
    """What a chat template writes begins with it already."""
    found = load_tokenizer(with_tokenizer(tmp_path))
    assert found.encode("<s>w1 w2", special=True) == found.encode("w1 w2", special=True) == [0, 4, 5]
    assert found.encode("<s>w1", special=False) == [0, 4] and found.encode("<s>", special=True) == [0]
    assert found.encode("<s><s>w1", special=True) == [0, 0, 4]  # as written
    assert found.encode("w1<s>", special=True) == [0, 4, 0]


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"model": None}, {"added_tokens": 5}, {"model": {"type": "BPE", "vocab": {"a": 10**30}, "merges": []}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"a": 1}}},
    ],
)  # fmt: skip
def test_a_tokenizer_that_fails_or_panics(
    tmp_path: Path, changed: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    def read() -> None:
        load_tokenizer(with_tokenizer(tmp_path, **changed)).encode("a" * 40 + "!", special=True)

    refused(read, str(tmp_path / "tokenizer.json"))
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_no_fault_of_a_tokenizer() -> None:
    from blockkit.checkpoint.tokenizer import guarded

    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), guarded("it fails"):
            raise error


# -- links, caches, what runs code -------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_what_links_point_to_outside_is_not_copied(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    for name in ("README.md", "LICENSE", "chat_template.jinja"):
        (tmp_path / "model" / name).symlink_to("../secret")
    opened = open_folder(tmp_path / "model")
    refused(lambda: write_folder(opened, tmp_path / "out", {}), "README.md", "LICENSE", "chat_template.jinja")
    assert not (tmp_path / "out").exists()
    for name in ("README.md", "LICENSE", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / "inner.md").symlink_to("config.json")
    write_folder(opened, tmp_path / "out", {})
    assert not any(f.is_symlink() for f in (tmp_path / "out").iterdir()) and (tmp_path / "out" / "inner.md").is_file()


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path: Path) -> None:
    write_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    write_folder(open_folder(snapshot), tmp_path / "out", {})
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "blobs").iterdir()}


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("what", ["alone", "in the index", "adapter", "attention", "code"])
def test_nothing_that_can_run_code_is_read(tmp_path: Path, what: str) -> None:
    import pickle

    pytest.importorskip("torch"), pytest.importorskip("transformers")
    from blockkit.backends.pytorch.calling.loading import load_model

    mark, folder = tmp_path / "mark", write_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    if what in ("alone", "in the index"):
        (folder / "model.safetensors").unlink()
    if what == "in the index":
        index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if what == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    if what == "attention":
        write_model(folder, {"_attn_implementation": "somebody/kernel"})
    if what == "code":
        (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")
        write_model(
            folder, {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
        )
    wanted = {"alone": "can run code", "in the index": "can run code", "adapter": "adapter_config.json",
              "attention": "somebody/kernel", "code": "cannot load"}[what]  # fmt: skip
    refused(lambda: load_model(folder, "float32"), wanted)
    assert not mark.exists()


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    import pickle

    pytest.importorskip("torch"), pytest.importorskip("transformers")
    from blockkit.backends.pytorch.calling.loading import load_model

    folder = write_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert load_model(folder, "float32").config.intermediate_size == INNER
    assert not (tmp_path / "mark").exists()


def test_a_cached_model_that_was_damaged_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from gguf_models import write_gguf

    from blockkit.checkpoint.cache import resolve_model

    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "m.gguf")
    folder = resolve_model(str(file))
    sound = {f.name: f.read_bytes() for f in folder.iterdir()}
    weights = folder / "model.safetensors"

    def flip() -> None:
        raw = bytearray(weights.read_bytes())
        raw[-100] ^= 1
        weights.write_bytes(bytes(raw))

    def linked() -> None:
        (tmp_path / "secret").write_text("{}")
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(tmp_path / "secret")

    def elsewhere() -> None:
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / "kept").touch()
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "aside")

    for spoil in (
        flip, linked, lambda: weights.write_bytes(b""), lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / ".blockkit.json").write_bytes(b"\xff"), lambda: (folder / "more.py").touch(), elsewhere,
    ):  # fmt: skip
        spoil()
        assert resolve_model(str(file)) == folder and not folder.is_symlink()
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == sound
    assert (tmp_path / "aside" / "kept").exists() and (tmp_path / "secret").read_text() == "{}"


def test_a_gguf_is_known_by_its_content_not_by_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from gguf_models import write_gguf

    from blockkit.checkpoint.cache import resolve_model

    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "m.gguf")
    before, status = resolve_model(str(file)), file.stat()
    raw = bytearray(file.read_bytes())
    raw[-8] ^= 1
    file.write_bytes(bytes(raw))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same path, size and time
    after = resolve_model(str(file))
    assert after != before
    assert (after / "model.safetensors").read_bytes() != (before / "model.safetensors").read_bytes()


def test_a_token_of_a_book_s_length(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_models import vocabulary, write_gguf

    from blockkit.checkpoint.gguf_file import convert_gguf

    tokens = vocabulary("llama")[0]

    def longer(writer: Any) -> None:
        writer.kv_data[0]["tokenizer.ggml.tokens"].value = [*tokens[:-1], "a" * 300_000]

    write_gguf(tmp_path / "m.gguf", keys=longer)
    refused(lambda: convert_gguf(tmp_path / "m.gguf", tmp_path / "out"), "tokens are far too long")
    assert gguf
