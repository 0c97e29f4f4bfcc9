"""A unit-RMS direction and a scale whose product is a given target, with the least change of the scale.

A norm without parameters can only set a direction n, mean(n^2) = 1; the scale m behind it does the
rest. Of all pairs with m' * n = g, the one with the least |m' - m| is stationary where

    m'^3 (m' - m) = lam g^2,   with lam such that mean((g / m')^2) = 1,

a scalar secular equation in lam with one monotone inner equation a coordinate. Dividing the target by
the scale as it is would blow up wherever m is tiny; here a tiny m simply grows to lam^(1/4) |g|^(1/2).

*Hard case*: where |g / m| is too short, no change of the scale along this branch makes n long enough.
Then the norm that is missing goes into the coordinate with the least |m|, which costs a change of at
most that |m| (near the least, not always the very least).
"""

from __future__ import annotations

import numpy as np

ENOUGH = 1e-6  # relative precision of |n|^2: the direction is brought to unit length afterwards


def closest_unit_rms(m: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The n `[width]`, mean(n^2) = 1, for which the scale g / n is nearest to m. Float64.

    lam is found by Newton steps on log(mean(n^2)) against log(lam), kept inside a shrinking bracket.
    """
    width, size = len(m), np.abs(m)
    signed = np.where(m < 0, -g, g)
    needs = signed != 0
    with np.errstate(over="ignore", divide="ignore"):
        short = np.divide(signed, size, out=np.zeros(width), where=needs)
        if np.sum(short**2) <= width:
            return _lengthened(short, size)
    squares, low, high = g**2, -700.0, 700.0
    log_lam = float(np.log(np.mean(squares[needs])))  # where the scale is negligible: a^4 = lam g^2
    n = signed
    for _ in range(60):
        grown = _grown(size, np.exp(log_lam) * squares)
        n = np.divide(signed, grown, out=np.zeros(width), where=needs)
        length = float(np.sum(n**2))
        excess = np.log(length / width)
        low, high = (log_lam, high) if excess > 0 else (low, log_lam)
        if abs(excess) < ENOUGH:
            break
        pull = np.divide(n**2 * (grown - size), 4 * grown - 3 * size, out=np.zeros(width), where=needs)
        slope = -2 * float(np.sum(pull)) / length
        step = log_lam - excess / slope if slope < 0 else low
        log_lam = step if low < step < high else (low + high) / 2
    return np.asarray(n * np.sqrt(width / np.sum(n**2)))


def _grown(size: np.ndarray, push: np.ndarray) -> np.ndarray:
    """The root a >= size of a^3 (a - size) = push, by Newton from above (the function is convex there)."""
    a = size + np.sqrt(np.sqrt(push))
    for _ in range(40):
        cube = a * a * a
        step = np.divide(cube * (a - size) - push, 4 * cube - 3 * size * a * a, out=np.zeros(len(a)), where=a > 0)
        a = np.maximum(a - step, size)
        if np.all(np.abs(step) <= 1e-9 * a):
            break
    return a


def _lengthened(n: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The hard case: the missing norm goes where the scale is least, with the sign that is there."""
    least = int(np.argmin(size))
    missing = len(n) - (np.sum(n**2) - n[least] ** 2)
    longer = n.copy()
    longer[least] = np.copysign(np.sqrt(missing), n[least])
    return longer
