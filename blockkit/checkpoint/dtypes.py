"""Values to and from the bytes of a safetensors element type."""

import numpy as np

from ..errors import BadInput

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
NARROW = {"BF16": "bfloat16", "F16": "float16"}
"""The types of 16 bits, by the name of the dtype that computes in them."""
WIDTHS = {"BF16": 2} | {name: np.dtype(code).itemsize for name, code in _NUMPY.items()}
"""Bytes per element of each type that can be read."""


def decode(raw: bytes, dtype: str) -> np.ndarray:
    """Return the values stored as `dtype`, flat and writable.

    F32, F16 and BF16 become float32; F64, integers and booleans keep their type.

    Raises:
        BadInput: values of this type cannot be read.
    """
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _NUMPY:
        raise BadInput(
            f"values of type {dtype} cannot be read; the types allowed are {', '.join(WIDTHS)}. "
            "Save the checkpoint in one of these first."
        )
    values = np.frombuffer(raw, _NUMPY[dtype])
    return values.astype(np.float32 if dtype == "F16" else values.dtype.newbyteorder("="))


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Return `values` as the bytes of `dtype`, rounded to the nearest, ties to even.

    Raises:
        BadInput: values of this type cannot be written, a finite value is too large for the type,
            or the type holds integers and a value is not one.
    """
    if dtype == "BF16":
        stored = _to_bfloat16(values)
        rounded = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype in _NUMPY:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = rounded = values.astype(_NUMPY[dtype])
    else:
        raise BadInput(f"values of type {dtype} cannot be written; allowed are {', '.join(WIDTHS)}.")
    if stored.dtype.kind == "f" or dtype == "BF16":
        overflow = np.isfinite(values) & ~np.isfinite(rounded)
        if overflow.any():
            raise BadInput(f"{np.abs(values[overflow]).max():g} is too large for type {dtype}.")
    elif not np.array_equal(rounded, values):
        raise BadInput(f"some values are not representable in the integer type {dtype}.")
    return stored.tobytes()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they come back from `dtype`: what `decode` gives of what `encode` wrote.

    Raises:
        BadInput: as for `encode`.
    """
    return decode(encode(values, dtype), dtype).reshape(values.shape)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves (uint16) of the float32 values, rounded to nearest, ties to even."""
    bits = _to_float32_sticky(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding could carry a NaN over to zero
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype("<u2")


def _to_float32_sticky(values: np.ndarray) -> np.ndarray:
    """Narrow to float32; an inexact result gets an odd last bit, so a second rounding is right."""
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values, np.float32)
    if values.dtype != np.float64:
        return narrow
    below, above = narrow < values, narrow > values
    even = narrow.view(np.uint32) & 1 == 0
    narrow = np.where(below & even, np.nextafter(narrow, np.float32(np.inf)), narrow)
    return np.where(above & even, np.nextafter(narrow, np.float32(-np.inf)), narrow)
