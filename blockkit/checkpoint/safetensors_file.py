"""One `.safetensors` file: its header, and where each tensor's bytes lie.

The layout is an 8-byte little-endian length, a JSON header of that length, then the raw values.
Knowing the byte ranges lets a checkpoint be read tensor by tensor and patched in place.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from .dtypes import WIDTHS

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the limit that the safetensors library sets itself


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `start` to `stop` of `file`, row-major, in `dtype`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read where every tensor of `file` lies, without reading a value.

    Raises:
        BadInput: the file cannot be read, is cut short, or its header is not valid.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise BadInput(
                    f"{file} is not a complete safetensors file: its header should take {length} "
                    f"bytes, and the file has {size}. Copy or download it again."
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error}") from error
    except ValueError as error:
        raise BadInput(f"{file} is not a safetensors file: bad header ({error}).") from error
    if not isinstance(header, dict):
        raise BadInput(f"{file} is not a safetensors file: its header is not a JSON object.")
    data = _LENGTH_BYTES + length
    entries = {k: _entry(file, k, v, data) for k, v in header.items() if k != "__metadata__"}
    expected = max((entry.stop for entry in entries.values()), default=data)
    if expected > size:
        raise BadInput(
            f"{file} is truncated: its header describes {expected} bytes, and the file has {size}. "
            "Copy or download it again."
        )
    return entries


def _entry(file: Path, name: str, fields: Any, data: int) -> StoredTensor:
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(n) for n in fields["shape"])
        begin, end = (int(n) for n in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file}: the header entry of tensor {name!r} is malformed.") from error
    width = WIDTHS.get(dtype)
    fits = width is None or end - begin == width * math.prod(shape)
    if not 0 <= begin <= end or min(shape, default=0) < 0 or not fits:
        raise BadInput(
            f"{file}: tensor {name!r} of type {dtype} and shape {list(shape)} does not fit "
            f"its byte range {begin} to {end}; the file is damaged."
        )
    return StoredTensor(file, dtype, shape, data + begin, data + end)


def write_float32(file: Path, shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[np.ndarray]) -> None:
    """Write float32 tensors one after another, holding one chunk in memory at a time.

    Args:
        shapes: every tensor's shape, in the order in which the values come.
        chunks: float32 arrays of any shape; joined, they are the values of all the tensors.

    Raises:
        BadInput: the chunks hold more or fewer values than the shapes say.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for chunk in chunks:
            written += stream.write(np.ascontiguousarray(chunk, "<f4").data.cast("B"))
    if written != end:
        raise BadInput(f"{file.name}: {written} bytes of values came where {end} were expected.")
