"""Checkpoints with a patch in them: what is written is what is proved, on the weights that it was made for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance import tiny_model
from safetensors.numpy import load_file

from blockkit.absorbing.algorithm import Absorbed, absorb
from blockkit.absorbing.backends import open_executor
from blockkit.absorbing.executor import reference, streamed
from blockkit.absorbing.measure import measure
from blockkit.absorbing.request import Request
from blockkit.absorbing.run import logits_of, run_stream
from blockkit.absorbing.written import narrow_dtypes, promised
from blockkit.checkpoint import identity
from blockkit.checkpoint.dtypes import encode
from blockkit.checkpoint.model import Model, open_model
from blockkit.errors import BadInput, BlockkitError, ExactnessLost
from blockkit.patch.patch import Patch

IDS = np.random.default_rng(3).integers(0, 50, size=16)
CODES = {"bfloat16": "BF16", "float16": "F16"}


def stored(family: str, dtype: str, folder: Path) -> Model:
    """A small random checkpoint, stored in 16 bits."""
    wide = tiny_model(family, folder)
    header, content = {}, b""
    for name, value in load_file(folder / "model.safetensors").items():
        raw = encode(value, CODES[dtype])
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(value.shape),
            "data_offsets": [len(content), len(content) + len(raw)],
        }
        content += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    return open_model(wide.folder.path)


def solved(model: Model, strategy: str, mode: str = "last") -> tuple[Patch, Absorbed]:
    executor = open_executor(model, "numpy", "float32")
    found = absorb(executor, Request(IDS[:12], IDS[12:], mode), strategy)
    promise = promised(model, found, "float32", measure(executor, found).floor.linf)
    return Patch.of(found, model, "float32", promise), found


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("family", ["gemma3_text", "llama", "gpt2"])
def test_the_reference_runs_in_sixteen_bits(family: str, dtype: str, tmp_path: Path) -> None:
    model = stored(family, dtype, tmp_path / "m")
    assert narrow_dtypes(model) == (dtype,)
    narrow, wide = (
        logits_of(e, run_stream(e, IDS, np.arange(16))) for e in (reference(model, dtype), reference(model))
    )
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert unit / 50 < np.abs(narrow - wide).max() / np.abs(wide).max() < 20 * unit
    again = streamed(model, dtype)
    assert np.array_equal(logits_of(again, run_stream(again, IDS, np.arange(16))), narrow)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("strategy", ["paper", "minimal", "matrix", "stable", "joint"])
@pytest.mark.parametrize("family", ["gemma3_text", "llama", "gpt2"])
def test_what_is_written_in_sixteen_bits_holds_or_does_not_appear(
    family: str, strategy: str, dtype: str, tmp_path: Path
) -> None:
    model = stored(family, dtype, tmp_path / "m")
    try:
        patch, found = solved(model, strategy)
        patch.save(tmp_path / "p")
        merged = Patch.load(tmp_path / "p").merge_into(model, tmp_path / "out")
    except BlockkitError as error:
        assert error.exit_status == 1 and not (tmp_path / "out").exists()
        return
    assert merged.proved is not None and merged.proved.dtype == dtype
    written = open_model(tmp_path / "out")
    for slot in patch.changes:  # byte for byte what the run that proved it had
        assert np.array_equal(written.parameter(slot), model.written(slot, patch.changes[slot]))
    executor = reference(written, "float32")
    own = logits_of(executor, run_stream(executor, IDS[12:], np.arange(12, 16)))[-1:]
    assert np.abs(own - found.patched).max() <= 1e-5 * np.abs(own).max()


def test_later_steps_take_up_what_sixteen_bits_leave(tmp_path: Path) -> None:
    model = stored("gemma3_text", "bfloat16", tmp_path / "m")
    request = Request(IDS[:12], IDS[12:])
    aware = absorb(open_executor(model, "numpy", "float32"), request, "minimal")
    unaware = absorb(reference(model, "float32"), request, "minimal")
    patches = [Patch.of(a, model, "float32") for a in (aware, unaware)]
    off = []
    for number, patch in enumerate(patches):
        out = tmp_path / f"out{number}"
        replace(patch, contextual={}).merge_into(model, out)
        executor = reference(open_model(out), "float64")
        own = logits_of(executor, run_stream(executor, IDS[12:], np.arange(12, 16)))[-1:]
        off.append(float(np.abs(own - aware.contextual).max()))
    assert off[0] < off[1] / 2


def test_a_patch_that_does_not_hold_as_written_does_not_appear(tmp_path: Path) -> None:
    model = stored("llama", "bfloat16", tmp_path / "m")
    patch, _ = solved(model, "matrix")
    wrong = {k: v + 1 for k, v in patch.contextual.items()}
    with pytest.raises(ExactnessLost, match=r"run in float64, is [0-9.e+-]+ away .* would be rounding there"):
        replace(patch, contextual=wrong).merge_into(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_other_weights_anywhere_are_refused_or_nothing_is_claimed(tensor: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m")
    patch, _ = solved(model, "stable")
    shutil.copytree(model.folder.path, tmp_path / "other")
    entry = open_model(tmp_path / "other").folder.stored[tensor]
    with entry.file.open("r+b") as file:
        file.seek(entry.stop - 4)
        file.write(np.float32(0.25).tobytes())
    other = open_model(tmp_path / "other")
    with pytest.raises(BadInput, match=r"the digest of all of the model's weights differs.*--allow-other-weights"):
        patch.merge_into(other, tmp_path / "out")
    merged = patch.merge_into(other, tmp_path / "out", allow_other_weights=True)
    assert merged.proved is None and merged.validity.startswith("not proved on these weights")


def test_a_part_of_a_patch_is_written_and_claims_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m")
    patch, _ = solved(model, "stable")
    slot = next(iter(patch.changes))
    part = replace(patch, changes={slot: patch.changes[slot]})
    merged = part.merge_into(model, tmp_path / "out")
    assert merged.proved is None and merged.validity.startswith("not proved: other changes were measured")


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    model, hashed, leaf = tiny_model("llama", tmp_path / "m"), [], identity._leaf
    monkeypatch.setattr(identity, "_leaf", lambda entry: hashed.append(entry) or leaf(entry))
    first = model.fingerprint()
    assert len(hashed) == len(model.folder.stored)
    assert open_model(model.folder.path).fingerprint() == first and len(hashed) == len(model.folder.stored)
    file = model.folder.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_model(model.folder.path).fingerprint() != first
    for note in (tmp_path / "cache" / "tensors").iterdir():
        note.write_text("{}")
    assert open_model(model.folder.path).fingerprint() != first  # a note that is none is not believed
