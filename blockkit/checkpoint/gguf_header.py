"""A `.gguf` file: its metadata and where each tensor's bytes lie.

Parsed here, from the published layout, because the reader in the `gguf` package takes ten seconds
for a vocabulary of 262 144 tokens and does not notice a file that is cut short.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import BadInput
from ..extras import require

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_LARGEST = 2**40  # of a number that counts something
_MOST_KEYS, _MOST_TENSORS, _MOST_TEXTS, _LONGEST = 10_000, 100_000, 4_000_000, 16 << 20
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

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text of the metadata.

        Raises:
            BadInput: the key holds something else.
        """
        return cast(str | None, self._typed(key, default, "a text", lambda v: type(v) is str))

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no of the metadata; see `text`."""
        return bool(self._typed(key, default, "true or false", lambda v: type(v) is bool))

    def token_id(self, key: str) -> int | None:
        """The id of a token, or None; see `text`."""
        wanted = "the id of a token"
        return cast(int | None, self._typed(key, None, wanted, lambda v: type(v) is int and 0 <= v < _LARGEST))

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number of the metadata, which must be there if there is no default; see `text`."""
        found = self._typed(key, default, "a positive whole number", lambda v: type(v) is int and 0 < v < _LARGEST)
        return cast(int, self._there(key, found))

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number of the metadata, which must be there if there is no default; see `text`."""
        found = self._typed(
            key, default, "a positive number", lambda v: type(v) in (int, float) and 0 < v < float(_LARGEST)
        )
        return float(cast(float, self._there(key, found)))

    def real_or_none(self, key: str) -> float | None:
        """A positive number of the metadata; None where the key is missing or holds a zero; see `text`."""
        value = self.metadata.get(key, 0)
        return None if type(value) in (int, float) and value == 0 else self.real(key)

    def texts(self, key: str) -> list[str]:
        """An array of texts in the metadata, which must be there; see `text`."""
        found = self._typed(key, None, "an array of texts", lambda v: type(v) is list)
        return cast(list[str], self._there(key, found))

    def numbers(self, key: str) -> np.ndarray:
        """An array of finite numbers in the metadata, which must be there; see `text`."""
        found = self._typed(
            key, None, "an array of finite numbers", lambda v: isinstance(v, np.ndarray) and np.isfinite(v).all()
        )
        return cast(np.ndarray, self._there(key, found))

    def _typed(self, key: str, default: Any, wanted: str, fits: Callable[[Any], Any]) -> Any:
        if key not in self.metadata:
            return default
        if not fits(value := self.metadata[key]):
            raise BadInput(
                f"{self.path}: the metadata {key} is {value!r:.40}, not {wanted}; the model cannot be converted."
            )
        return value

    def _there(self, key: str, value: Any) -> Any:
        if value is None:
            raise BadInput(f"{self.path}: the metadata {key} is missing; the model cannot be converted.")
        return value


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
        self.require_few("metadata entries", metadata_count, _MOST_KEYS, 13)
        self.require_few("tensors", tensor_count, _MOST_TENSORS, 24)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"the metadata {key!r:.100} is given twice")
            metadata[key] = self.value(self.unpack("<I"))
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment < 2**20 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r:.40}, not a power of two")
        base = -(-self.position // alignment) * alignment
        tensors = [self.place(base, *entry) for entry in entries]
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self.damaged("two tensors have the same name")
        return GgufHeader(self.path, metadata, {tensor.name: tensor for tensor in tensors})

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.unpack("<I")
        if rank > 4:
            raise self.damaged(f"tensor {name!r:.100} has {rank} dimensions, more than 4")
        shape = tuple(self.unpack("<Q") for _ in range(rank))[::-1]
        return name, shape, self.unpack("<I"), self.unpack("<Q")

    def place(self, base: int, name: str, shape: tuple[int, ...], block_type: int, offset: int) -> GgufTensor:
        """Where a tensor's bytes lie, checked against the end of the file."""
        gguf = require("gguf")
        try:
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(block_type)]
        except (KeyError, ValueError) as error:
            raise BadInput(
                f"{self.path}: tensor {name!r:.100} has the unknown block type {block_type}. "
                "A newer version of the package gguf may know it."
            ) from error
        if not shape or 0 in shape or shape[-1] % per_block:
            raise self.damaged(f"tensor {name!r:.100} has shape {list(shape)}, not whole blocks of {per_block} values")
        start, size = base + offset, math.prod(shape) // per_block * block_bytes
        if start + size > len(self.data):
            raise self.cut_short(f"tensor {name!r:.100} ends at byte {start + size}")
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
        self.require_few("texts in an array", count, _MOST_TEXTS, 8)
        return [self.string() for _ in range(count)]

    def string(self) -> str:
        try:
            return self.take(self.unpack("<Q"), _LONGEST).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not valid UTF-8 ({error.reason})") from error

    def unpack(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def require_few(self, what: str, count: int, most: int, bytes_each: int) -> None:
        """Finds out before a loop over them."""
        if self.position + count * bytes_each > len(self.data):
            raise self.cut_short(f"it says that it has {count} {what}")
        if count > most:
            raise self.damaged(f"it has {count} {what}; at most {most} are read")

    def take(self, count: int, most: int = 1 << 40) -> bytes:
        end = self.position + count
        if count > most:
            raise self.damaged(f"a text of {count} bytes; at most {most} are read")
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
