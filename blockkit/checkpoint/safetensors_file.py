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
from ..json_reader import MOST_BYTES, parse_json
from .dtypes import WIDTHS

_LENGTH_BYTES = 8
_MOST_AXES = 16
_LONGEST_NAME = 1000
_MOST = 2**48  # of an axis or a byte offset; more no file holds


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
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise BadInput(
                    f"{file} is not a complete safetensors file: its header should take {length} "
                    f"bytes, and the file has {size}. Copy or download it again."
                )
            if length > MOST_BYTES:
                raise BadInput(f"{file}: its header is larger than {MOST_BYTES >> 20} MiB.")
            text = stream.read(length).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{file} is not a safetensors file: its header is not text (UTF-8).") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {str(file)!r:.300}: {getattr(error, 'strerror', None) or error}") from None
    header = parse_json(text, f"{file} is not a safetensors file: bad header")
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
    _require_apart(file, entries)
    return entries


def _require_apart(file: Path, entries: Mapping[str, StoredTensor]) -> None:
    """Refuses two tensors that share bytes: a change of one would change the other."""
    last, name = None, ""
    for key, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].stop)):
        if last is not None and entry.start < last.stop:
            raise BadInput(f"{file}: the tensors {name!r:.200} and {key!r:.200} share bytes; the file is damaged.")
        if entry.stop > entry.start:
            last, name = entry, key


def _entry(file: Path, name: str, fields: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: the header entry of tensor {name!r:.200} is malformed.") from None
    whole = all(type(n) is int and abs(n) < _MOST for n in numbers)
    if type(dtype) is not str or not whole or len(shape) > _MOST_AXES or len(name) > _LONGEST_NAME:
        raise BadInput(f"{file}: the header entry of tensor {name!r:.200} is malformed.")
    shape, width = tuple(shape), WIDTHS.get(dtype)
    fits = width is None or end - begin == width * math.prod(shape)
    if not 0 <= begin <= end or min(shape, default=0) < 0 or not fits:
        raise BadInput(
            f"{file}: tensor {name!r:.200} of type {dtype:.20} and shape {list(shape)} does not fit "
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
