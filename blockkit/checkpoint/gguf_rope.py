"""Rotary positions of a GGUF model as `config.json` writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from .gguf_header import GgufHeader

FACTORS = "rope_freqs.weight"
_USUAL = (8192.0, 1.0, 4.0)  # original length, low and high factor, of every Llama 3


def rope_scaling(header: GgufHeader, prefix: str, head_dim: int, base: float) -> dict[str, Any] | None:
    """The section `rope_scaling` of the configuration; None for no scaling.

    A factor without a type is linear, as llama.cpp reads it; the factor's older name is `rope.scale_linear`. Llama 3's
    scaling stands in a tensor of factors, one for each rotary frequency.

    Raises:
        BadInput: a kind of scaling that is not supported.
    """
    kind = header.text(f"{prefix}.rope.scaling.type", "linear")
    names = (f"{prefix}.rope.scaling.factor", f"{prefix}.rope.scale_linear")
    given = next((factor for name in names if (factor := header.real_or_none(name)) is not None), 1.0)
    factor = given if kind != "none" else 1.0
    if kind not in ("linear", "none"):
        raise BadInput(f"{header.path}: rope scaling {kind!r:.40} is not supported; linear is allowed.")
    if FACTORS in header.tensors:
        if factor != 1.0:
            raise BadInput(f"{header.path}: rope scaling by {FACTORS} and by a factor of {factor} at once.")
        return _llama3(header.path, _factors(header, head_dim), base, head_dim)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _factors(header: GgufHeader, head_dim: int) -> np.ndarray:
    """By how much each frequency is divided: [head_dim / 2]."""
    tensor = header.tensors[FACTORS]
    if tensor.shape != (head_dim // 2,) or tensor.block_type != 0:
        raise BadInput(f"{header.path}: {FACTORS} has shape {list(tensor.shape)}, expected float32 [{head_dim // 2}].")
    with header.path.open("rb") as stream:
        stream.seek(tensor.start)
        found = np.frombuffer(stream.read(tensor.size), "<f4").astype(float)
    if not np.isfinite(found).all() or not (found >= 1).all():
        raise BadInput(f"{header.path}: {FACTORS} holds numbers that are no factors of at least 1.")
    return found


def _llama3(path: Path, factors: np.ndarray, base: float, head_dim: int) -> dict[str, Any] | None:
    """The settings from which Llama 3's rule gives these factors.

    Raises:
        BadInput: none do.
    """
    if (factors == 1).all():
        return None
    lengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(f"{factors.max():.6g}")
    for original, low, high in _candidates(factors, lengths, factor):
        smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }  # fmt: skip
    raise BadInput(f"{path}: {FACTORS} does not follow Llama 3's rule, the only one that is supported.")


def _candidates(factors: np.ndarray, lengths: np.ndarray, factor: float) -> Iterator[tuple[float, float, float]]:
    """The usual settings, and those of the line through the frequencies between the two ends, with a low factor of 1.

    Only original / (high - low) and low / (high - low) can be told from the factors.
    """
    yield _USUAL
    between = (factors > 1) & (factors < factor)
    if between.sum() > 1:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(1 / lengths[between], smooth, 1)
        if start < 0 < slope:
            yield float(round(slope / -start)), 1.0, float(np.round(1 - 1 / start, 6))
