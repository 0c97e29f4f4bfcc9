"""A `.gguf` file: its metadata and where each tensor's bytes lie.

Parsed here, from the published layout, because the reader in the `gguf` package takes ten seconds
for a vocabulary of 262 144 tokens and does not notice a file that is cut short.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from ..extras import require

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Value type -> NumPy code: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64.
_NUMBERS = dict(
    zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"),
        strict=True,
    )
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape (rows first, as NumPy has it), block type, and bytes in the file."""

    name: str
    shape: tuple[int, ...]
    block_type: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file but the tensor values; arrays of numbers are NumPy arrays."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; every tensor is known to lie inside the file.

    Raises:
        BadInput: the file cannot be read, is not GGUF, has another version, or is cut short.
        MissingDependency: the package `gguf` is not installed.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise BadInput(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from error


class _Parser:
    """Reads values one after another from a memory map."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, len(_MAGIC)

    def header(self) -> GgufHeader:
        """The whole header, checked."""
        version = self.unpack("<I")
        if version not in _VERSIONS:
            swapped = " (written for big-endian machines)" if version & 0xFFFF == 0 else ""
            raise BadInput(
                f"{self.path} is GGUF version {version}{swapped}; little-endian versions "
                f"{' and '.join(map(str, _VERSIONS))} are supported. Convert the model again."
            )
        tensor_count, metadata_count = self.unpack("<Q"), self.unpack("<Q")
        metadata = {}
        for _ in range(metadata_count):
            key = self.string()
            metadata[key] = self.value(self.unpack("<I"))
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        base = -(-self.position // alignment) * alignment
        tensors = [self.place(base, *entry) for entry in entries]
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self.damaged("two tensors have the same name")
        return GgufHeader(self.path, metadata, {tensor.name: tensor for tensor in tensors})

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.unpack("<I")
        if rank > 4:
            raise self.damaged(f"tensor {name!r} has {rank} dimensions, more than 4")
        shape = tuple(self.unpack("<Q") for _ in range(rank))[::-1]
        return name, shape, self.unpack("<I"), self.unpack("<Q")

    def place(self, base: int, name: str, shape: tuple[int, ...], block_type: int, offset: int) -> GgufTensor:
        """Where a tensor's bytes lie, checked against the end of the file."""
        gguf = require("gguf")
        try:
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(block_type)]
        except (KeyError, ValueError) as error:
            raise BadInput(
                f"{self.path}: tensor {name!r} has the unknown block type {block_type}. "
                "A newer version of the package gguf may know it."
            ) from error
        if not shape or 0 in shape or shape[-1] % per_block:
            raise self.damaged(f"tensor {name!r} has shape {list(shape)}, not whole blocks of {per_block} values")
        start, size = base + offset, math.prod(shape) // per_block * block_bytes
        if start + size > len(self.data):
            raise self.cut_short(f"tensor {name!r} ends at byte {start + size}")
        return GgufTensor(name, shape, block_type, start, size)

    def value(self, kind: int) -> Any:
        """The next metadata value of that kind."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            number = self.numbers(kind, 1)[0]
            # A float32 by its shortest decimal: 1e-06, not 9.999999974752427e-07.
            return float(str(number)) if number.dtype == np.float32 else number.item()
        kind, count = self.unpack("<I"), self.unpack("<Q")
        return self.strings(count) if kind == _STRING else self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise self.damaged(f"unknown value type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def strings(self, count: int) -> list[str]:
        return [self.string() for _ in range(count)]

    def string(self) -> str:
        try:
            return self.take(self.unpack("<Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not valid UTF-8 ({error.reason})") from error

    def unpack(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self.cut_short(f"a header value ends at byte {end}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def cut_short(self, where: str) -> BadInput:
        return BadInput(
            f"{self.path} is truncated: {where}, and the file has {len(self.data)}. Copy or download it again."
        )

    def damaged(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is damaged before byte {self.position}: {what}.")
