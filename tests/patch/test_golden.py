"""Patch files that earlier versions wrote: they are read, and checked as far as they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import tiny_model

from blockkit import Patch
from blockkit.checkpoint.model import Model, open_model
from blockkit.errors import BadInput

HERE = Path(__file__).parent / "golden"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return tiny_model("gemma3_text", tmp_path / "model")


def test_a_checkpoints_patch_of_format_1(model: Model, tmp_path: Path) -> None:
    patch = Patch.load(HERE / "checkpoint-format-1.safetensors")
    assert (patch.strategy, patch.context_length, len(patch.query), patch.whole) == ("minimal", 8, 4, True)
    merged = patch.merge_into(model, tmp_path / "out")
    assert merged.proved is None and merged.validity.startswith("not proved in this form")
    assert len(open_model(tmp_path / "out").parts) == len(model.parts)


def test_a_checkpoints_patch_of_format_1_on_other_weights(model: Model, tmp_path: Path) -> None:
    patch = Patch.load(HERE / "checkpoint-format-1.safetensors")
    slot = next(iter(patch.changes))
    file = model.folder.stored[model.parts[slot].tensors[0]].file
    content = bytearray(file.read_bytes())
    content[model.folder.stored[model.parts[slot].tensors[0]].start + 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match="the weights that it changes differs"):
        patch.merge_into(open_model(model.folder.path), tmp_path / "out")


def test_a_models_patch_of_format_1() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    llama: Any = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(11)
    for _, p in sorted(llama.named_parameters()):
        value = rng.normal(size=p.shape).astype(np.float32) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1)
        p.data = torch.from_numpy(value + (0 if p.dim() > 1 else 1)).float()
    ids = torch.as_tensor(np.arange(3, 15) * 3 % 50)[None]
    patch = Patch.load(HERE / "pytorch-format-1.safetensors")
    with torch.no_grad():
        wanted = llama(ids).logits[0, -1]
        with patch.applied(llama) as receipt:
            found = llama(ids[:, 8:], position_ids=torch.as_tensor(patch.position_ids)).logits[0, -1]
    assert receipt.exact and float((found - wanted).abs().max()) < 1e-5
    llama.get_parameter(next(iter(patch.changes))).data.mul_(2)
    with pytest.raises(BadInput, match="other values of the weights that it changes"):
        patch.apply(llama)
