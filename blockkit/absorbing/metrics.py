"""Error measures between two sets of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits, `[tokens, vocabulary]`.

    Attributes:
        linf: the largest absolute difference of a logit.
        tvd: the largest total variation distance of the tokens' next-token distributions, 0 to 1.
        top1_agree: the share of tokens with the same most probable next token, 0 to 1.
    """

    linf: float
    tvd: float
    top1_agree: float


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the vocabulary, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def compare(logits: np.ndarray, wanted: np.ndarray) -> Comparison:
    """Measures `logits` against `wanted`, both `[tokens, vocabulary]`."""
    if logits.shape != wanted.shape or not logits.size:
        raise ValueError(f"cannot compare logits of shapes {logits.shape} and {wanted.shape}")
    difference = np.abs(logits.astype(np.float64) - wanted)
    tvd = 0.5 * np.abs(probabilities(logits) - probabilities(wanted)).sum(axis=-1)
    agree = logits.argmax(axis=-1) == wanted.argmax(axis=-1)
    return Comparison(float(difference.max()), float(tvd.max()), float(agree.mean()))
