"""What tests share about checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conformance import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from blockkit.checkpoint.model import Model, slots


def with_tokenizer(family: str, folder: Path, words: int = 49) -> Path:
    tiny_model(family, folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def insist_that_slots_cover(model: Model, uncovered: int = 0) -> None:
    """The slots read and write every value of the file but `uncovered` ones, each in one place."""
    values = {slot: model.parameter(slot) for slot, _ in slots(model.architecture)}
    assert all(values[slot].shape == shape for slot, shape in slots(model.architecture))
    back = model.rewritten(values)
    assert back.keys() == model.folder.shapes.keys()
    assert all(np.array_equal(value, model.folder.tensor(name)) for name, value in back.items())
    marked = model.rewritten({slot: np.full(value.shape, np.nan) for slot, value in values.items()})
    assert sum(int(np.isfinite(value).sum()) for value in marked.values()) == uncovered
    assert sum(value.size for value in values.values()) + uncovered == sum(value.size for value in marked.values())
