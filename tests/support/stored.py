"""Files of checkpoints, whole and damaged."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np


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


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def corrupt(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw and len(old) == len(new)
    file.write_bytes(raw.replace(old, new))


def leftovers(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}
