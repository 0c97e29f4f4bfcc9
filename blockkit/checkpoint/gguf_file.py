"""A `.gguf` model file turned into a Hugging Face checkpoint folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import new_folder
from ..errors import BadInput
from ..extras import require
from ..progress import Progress, silent
from .configuration import from_config
from .gguf_header import GgufHeader, GgufTensor, read_gguf_header
from .gguf_layouts import Target, layout_of
from .gguf_tokenizer import build_tokenizer, tokenizer_config
from .safetensors_file import write_float32

_VALUES_AT_ONCE = 1 << 20


def convert_gguf(path: Path, out: Path, progress: Progress | None = None) -> None:
    """Write the model in the GGUF file `path` as the Hugging Face folder `out`, in float32.

    The folder gets config.json, model.safetensors, tokenizer.json and tokenizer_config.json, and
    appears complete or not at all. A few megabytes of values are in memory at a time.

    Args:
        progress: called with "tokenizer" or "weights" and a fraction from 0 to 1.

    Raises:
        BadInput: the file is damaged or holds an unsupported model, or `out` cannot be written.
        MissingDependency: the packages `gguf` or `tokenizers` are not installed.
    """
    report = progress or silent
    header = read_gguf_header(path)
    config, targets = layout_of(header)
    from_config(config, str(path))  # before anything is written: what cannot be opened is not converted
    _require_readable_types(header)
    with new_folder(out) as partial:
        report("tokenizer", 0.0)
        tokenizer = build_tokenizer(header)
        tokenizer.save(str(partial / "tokenizer.json"))
        _write_json(partial / "tokenizer_config.json", tokenizer_config(header))
        _write_json(partial / "config.json", config)
        report("tokenizer", 1.0)
        shapes = {target.name: target.shape for target in targets.values()}
        chunks = _all_values(header, targets, report)
        write_float32(partial / "model.safetensors", shapes, chunks)


def _require_readable_types(header: GgufHeader) -> None:
    """Try each block type on one block, so that a type without a reader is refused at once."""
    gguf = require("gguf")
    for tensor in {tensor.block_type: tensor for tensor in header.tensors.values()}.values():
        kind = gguf.GGMLQuantizationType(tensor.block_type)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise BadInput(
                f"{header.path}: tensor {tensor.name} is stored as {kind.name}, which the package "
                "gguf cannot read. Use a file with a common type, such as Q8_0 or Q4_K."
            ) from error


def _all_values(header: GgufHeader, targets: Mapping[str, Target], report: Progress) -> Iterator[np.ndarray]:
    total = sum(tensor.size for tensor in header.tensors.values())
    done = 0
    for name, target in targets.items():
        report("weights", done / total)
        tensor = header.tensors[name]
        yield from _values(header.path, tensor, target)
        done += tensor.size
    report("weights", 1.0)


def _values(path: Path, tensor: GgufTensor, target: Target) -> Iterator[np.ndarray]:
    """Yield the float32 values of a target, some rows at a time: arrays (rows, row length)."""
    gguf = require("gguf")
    kind = gguf.GGMLQuantizationType(tensor.block_type)
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    blocks = np.memmap(path, np.uint8, "r", tensor.start, (rows, tensor.size // rows))
    order = _row_order(rows, target.paired_heads)
    step = max(1, _VALUES_AT_ONCE // tensor.shape[-1])
    for begin in range(0, rows, step):
        values = gguf.dequantize(blocks[order[begin : begin + step]], kind)
        yield values - np.float32(target.added) if target.added else values


def _row_order(rows: int, heads: int) -> np.ndarray:
    """Return which stored row goes where: (rows,) int64.

    With `heads`, each head's rows are stored as pairs (first half, second half) and are unpaired.
    """
    order = np.arange(rows)
    if heads == 0:
        return order
    return order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
