"""What counts as a proof of a patch: error, rounding, and what is wrong without the patch."""

from __future__ import annotations

import numpy as np
import pytest

from blockkit.absorbing.metrics import Comparison
from blockkit.absorbing.proof import require_exact
from blockkit.errors import ExactnessLost

LOGITS = np.array([[20.0, -3.0]])


def proved(linf: float, dtype: str, unpatched: float | None) -> bool:
    try:
        require_exact(
            Comparison(linf, 0.0, 1.0), LOGITS, dtype, None if unpatched is None else lambda: float(unpatched or 0)
        )
    except ExactnessLost:
        return False
    return True


@pytest.mark.parametrize(
    ("linf", "dtype", "unpatched", "wanted"),
    [
        (1e-5, "float32", 0.0, True),  # rounding, whatever there was to do
        (1e-3, "float32", 0.1, True),  # ill-conditioned, but of some use
        (1e-3, "float32", 0.005, False),
        (1e-3, "float32", None, True),
        (0.3, "float32", 100.0, False),
        (0.5, "bfloat16", 0.6, True),
        (3.0, "bfloat16", 5.0, False),
        (3.0, "bfloat16", 40.0, True),
        (float("nan"), "float32", 1.0, False),
        (float("nan"), "bfloat16", None, False),
        (1e-6, "float64", 1.0, True),
        (1e-4, "float64", 1.0, False),
    ],
)
def test_what_is_proved(linf: float, dtype: str, unpatched: float | None, wanted: bool) -> None:
    assert proved(linf, dtype, unpatched) is wanted
