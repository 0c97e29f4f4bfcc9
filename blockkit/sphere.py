"""A unit-RMS direction and a scale whose product is a given target, with the least change of the scale.

A norm without parameters can only set a direction n, mean(n^2) = 1; the scale m behind it does the
rest. Of all pairs with m' * n = g, the one with the least |m' - m| is stationary where

    m'^3 (m' - m) = lam g^2,   with lam such that mean((g / m')^2) = 1,

a scalar secular equation in lam with one monotone inner equation a coordinate. Dividing the target by
the scale as it is would blow up wherever m is tiny; here a tiny m simply grows to lam^(1/4) |g|^(1/2).

*Hard case*: where |g / m| is too short, no small change of the scale makes n long enough along this
branch. Then the norm that is missing goes into the coordinate with the least |m|, where a longer n
costs the least change of the scale.
"""

from __future__ import annotations

import numpy as np


def closest_unit_rms(m: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The n `[width]`, mean(n^2) = 1, for which the scale g / n is nearest to m. Float64."""
    width = len(m)
    sign = np.where(m < 0, -1.0, 1.0)
    size = np.abs(m)

    def direction(lam: float) -> np.ndarray:
        grown = _grown(size, lam * g**2)
        return np.divide(sign * g, grown, out=np.zeros(width), where=g != 0)

    with np.errstate(over="ignore", divide="ignore"):
        short = np.divide(sign * g, size, out=np.zeros(width), where=g != 0)
        if np.sum(short**2) <= width:
            return _lengthened(short, size)
    low, high = 0.0, 1.0
    while np.sum(direction(high) ** 2) > width:
        low, high = high, high * 16
    for _ in range(200):
        middle = (low + high) / 2 if low * 16 > high else np.sqrt(max(low, high * 1e-32) * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if np.sum(direction(middle) ** 2) > width else (low, middle)
    n = direction(high)
    return np.asarray(n * np.sqrt(width / np.sum(n**2)))


def _grown(size: np.ndarray, push: np.ndarray) -> np.ndarray:
    """The root a >= size of a^3 (a - size) = push, by Newton from above (the function is convex there)."""
    a = size + push**0.25
    for _ in range(60):
        step = (a**3 * (a - size) - push) / np.where(a > 0, a**2 * (4 * a - 3 * size), 1.0)
        a = np.maximum(a - step, size)
        if np.all(np.abs(step) <= 1e-15 * a):
            break
    return a


def _lengthened(n: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The hard case: the missing norm goes where the scale is least, with the sign that is there."""
    least = int(np.argmin(size))
    missing = len(n) - (np.sum(n**2) - n[least] ** 2)
    longer = n.copy()
    longer[least] = np.copysign(np.sqrt(missing), n[least])
    return longer
