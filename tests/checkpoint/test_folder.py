"""Folders of a checkpoint: read, refused, and written with the bytes that did not change."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_models import needs_transformers
from stored import BRAIN, COUNT, DOUBLE, FIRST, HALF, SECOND, SINGLE, corrupt, leftovers, truncate, write_safetensors

from blockkit.checkpoint.dtypes import decode, encode
from blockkit.checkpoint.folder import CheckpointFolder, open_folder, write_folder
from blockkit.errors import BadInput


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{\n "a": }'), "line 2, column 7"),
        (lambda f: (f / "config.json").write_text("[]"), "JSON object, not list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot read .*config.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"\.bin .*save_pretrained"),
        (lambda f: [x.unlink() for x in f.glob("*model*")], "has no weights"),
        (lambda f: truncate(f / "model.safetensors", 4), "not a complete safetensors"),
        (lambda f: truncate(f / "model.safetensors", 100), "not a complete safetensors"),
        (lambda f: truncate(f / "model.safetensors", -1), r"model\.safetensors is truncated"),
        (lambda f: corrupt(f / "model.safetensors", b'{"__m', b'<"__m'), "bad header"),
        (lambda f: corrupt(f / "model.safetensors", b"[2, 3]", b"[2, 4]"), "does not fit"),
        (lambda f: corrupt(f / "model.safetensors", b"shape", b"shale"), "malformed"),
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
        (lambda f: truncate(next(f.glob("*2-of*")), -1), "00002-of-00002.* is truncated"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (
            lambda f: corrupt(f / "model.safetensors.index.json", b"b.count", b"b.coumt"),
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
    truncate(single / "model.safetensors", -20)
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
    expected = leftovers(checkpoint.path) - {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert leftovers(out) == expected
    for file in out.iterdir():
        assert file.read_bytes() == (checkpoint.path / file.name).read_bytes()
    assert leftovers(out.parent) == {"out"}


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
    assert leftovers(tmp_path) == {"single"}


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
    assert leftovers(tmp_path) == {"single"}
