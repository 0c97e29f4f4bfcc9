"""Where a name leads: folders, GGUF files converted once, and the real Gemma 3 270M."""

import importlib.util
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from gguf_models import (
    GEMMA_PACKAGE,
    NORMS,
    TEXTS,
    gguf,
    hf_tensors,
    matrices,
    needs_gemma,
    needs_transformers,
    write_gguf,
)
from processes import HANGS
from stored import leftovers

from blockkit.checkpoint.cache import resolve_model
from blockkit.checkpoint.folder import open_folder
from blockkit.checkpoint.gguf_file import convert_gguf
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BadInput, MissingDependency

CHECKING = "checking the cached model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    assert len(leftovers(cache / "models")) == 2


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
    assert leftovers(cache / "models") == set()


def test_two_conversions_may_race(tmp_path: Path, cache: Path) -> None:
    file, found, meeting = write_gguf(tmp_path / "m.gguf"), [], threading.Barrier(2, timeout=HANGS)

    def meet(stage: str, fraction: float) -> None:
        if (stage, fraction) == ("weights", 1.0):
            meeting.wait()

    threads = [threading.Thread(target=lambda: found.append(resolve_model(str(file), meet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert leftovers(cache / "models") == {found[0].name}
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
    assert set(stages) == {CHECKING} and leftovers(folder.parent) == {folder.name}
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
