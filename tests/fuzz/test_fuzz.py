"""Twenty thousand damaged files: every reader refuses or accepts each, in bounded memory (`run.py` has the clock)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from readers import CORPUS, READERS, read_sample
from run import Found, bounded, fuzz, one

from blockkit.errors import BadInput

COUNT = int(os.environ.get("BLOCKKIT_FUZZ", "20000"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_no_damaged_file_escapes_its_reader(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    folder = memory / f"blockkit-{os.getpid()}" if memory.is_dir() else tmp_path
    folder.mkdir(exist_ok=True)
    try:
        with bounded():
            found = fuzz(COUNT, 0, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert not found.faults, "\n".join(found.faults[:5])
    for name in READERS:  # neither is all refused at the door, nor is nothing damaged
        assert found.outcomes[name, "accepted"] > 0 and found.outcomes[name, "refused"] > 0, name


def test_a_fault_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **settings: object) -> object:
        raise RecursionError("not foreseen")

    monkeypatch.setattr("blockkit.checkpoint.safetensors_file.parse_json", broken)
    found = Found()
    for number in range(40):
        one("safetensors", 0, number, tmp_path, found)
    assert found.outcomes["safetensors", "fault"] > 0 and "not foreseen" in found.faults[0]


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda f: f.name)
def test_what_once_escaped_is_refused(file: Path) -> None:
    with pytest.raises(BadInput):
        read_sample(file)
