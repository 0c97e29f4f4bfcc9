"""A checkpoint in one file."""

from pathlib import Path

import pytest
from stored import FIRST, SECOND, write_safetensors


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
