"""The closest direction of unit RMS: optimal, feasible, and honest where there is none."""

import numpy as np
import pytest
from chains import SLOW
from hypothesis import given
from hypothesis import strategies as st

from blockkit.solve import sphere
from blockkit.solve.sphere import closest_unit_rms


def cost(m: np.ndarray, g: np.ndarray, n: np.ndarray) -> float:
    """|m' - m|^2 for m' = g / n; where both are zero the scale stays."""
    scale = np.divide(g, n, out=np.where(g == 0, np.where(n == 0, m, 0.0), np.inf), where=n != 0)
    return float(np.sum((scale - m) ** 2))


def insist_on_direction(m: np.ndarray, g: np.ndarray) -> np.ndarray:
    n = closest_unit_rms(m, g)
    assert n.shape == m.shape
    assert np.isfinite(n).all()
    assert abs(np.mean(n**2) - 1) <= 1e-12
    assert np.isfinite(cost(m, g, n))
    assert not np.any((g != 0) & (n == 0))
    return n


def insist_on_minimum(m: np.ndarray, g: np.ndarray, n: np.ndarray, seed: int) -> None:
    """No small feasible change of direction brings the scale nearer."""
    rng, best, found = np.random.default_rng(seed), cost(m, g, n), []
    moving = n != 0
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(25):
            other = np.where(moving, n * np.exp(size * rng.normal(size=len(n))), 0.0)
            found.append(cost(m, g, other / np.sqrt(np.mean(other**2))))
    assert best <= min(found) * (1 + 1e-9) + 1e-12


@SLOW
@given(st.integers(2, 24), st.floats(1.0, 30.0), st.integers(0, 10**6))
def test_the_direction_is_a_local_minimum(width: int, longer: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=width)
    short = rng.normal(size=width)
    g = m * short * longer / np.sqrt(np.mean(short**2))  # |g / m| is long enough: not the hard case
    insist_on_minimum(m, g, insist_on_direction(m, g), seed)


@SLOW
@given(st.integers(2, 24), st.integers(0, 10**6), st.sampled_from(["m", "g", "both", "negative", "tiny", "unequal"]))
def test_the_direction_with_zeros_and_signs(width: int, seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    m, g = rng.normal(size=width), 3 * rng.normal(size=width)
    some = rng.random(width) < 0.5
    some[0] = True
    match what:
        case "m":
            m[some] = 0.0
        case "g":
            g[some] = 0.0
        case "both":
            m[some], g[rng.random(width) < 0.5] = 0.0, 0.0
        case "negative":
            m = -np.abs(m)
        case "tiny":
            m[some] *= 1e-12
        case "unequal":
            m, g = m * 10.0 ** rng.integers(-6, 6, width), g * 10.0 ** rng.integers(-6, 6, width)
    n = insist_on_direction(m, g)
    moved = np.divide(g, n, out=m.copy(), where=n != 0)
    assert not np.any((m != 0) & (moved * m < 0)), "the scale keeps its sign"
    if what in ("m", "negative") and np.sum(np.divide(g, m, out=np.full(width, np.inf), where=m != 0) ** 2) > width:
        insist_on_minimum(m, g, n, seed)


def test_the_hard_case_puts_what_is_missing_where_the_scale_is_least() -> None:
    m, g = np.array([2.0, -0.1, 3.0, 1.5]), np.array([1.0, 0.05, -0.5, 0.3])
    n = insist_on_direction(m, g)
    kept = [0, 2, 3]
    assert np.allclose((g / n)[kept], m[kept])
    assert 0 < (g / n)[1] / m[1] <= 1
    assert cost(m, g, n) <= m[1] ** 2


@SLOW
@given(st.integers(2, 24), st.just(0.0) | st.floats(1e-6, 0.99), st.integers(0, 10**6))
def test_the_hard_case_costs_at_most_the_least_scale(width: int, length: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, short = rng.normal(size=width), rng.normal(size=width)
    g = m * short * length / np.sqrt(np.mean(short**2))
    n = insist_on_direction(m, g)
    assert cost(m, g, n) <= np.min(np.abs(m)) ** 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("m", "g"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]),
        ([1.0] * 8, [50.0] + [0.0] * 7),
        ([1.0], [-3.0]),
        ([1e-30, 1.0], [1e-30, 1e-30]),
        ([1e60, 1.0], [1.0, 1e60]),
    ],
)
def test_the_direction_at_the_edges(m: list[float], g: list[float]) -> None:
    with np.errstate(all="ignore"):
        insist_on_direction(np.array(m), np.array(g))


def test_the_direction_stays_put_where_it_is_already_of_unit_length() -> None:
    m = np.array([0.5, -2.0, 3.0])
    n = np.array([1.0, -1.0, 1.0])
    assert np.allclose(closest_unit_rms(m, m * n), n)


def test_a_direction_that_only_divides_is_noticed() -> None:
    """The plain way, rescaled to unit length, is no minimum: the check of minima can fail."""
    rng = np.random.default_rng(0)
    m, g = rng.normal(size=8), 5 * rng.normal(size=8)
    plain = g / m
    plain = plain / np.sqrt(np.mean(plain**2))
    with pytest.raises(AssertionError):
        insist_on_minimum(m, g, plain, 0)


def test_the_secular_equation_is_monotone() -> None:
    size, push = np.array([0.0, 1.0, 2.0]), np.array([16.0, 8.0, 0.0])
    grown = sphere._grown(size, push)
    assert np.allclose(grown**3 * (grown - size), push)
    assert (grown >= size).all()
