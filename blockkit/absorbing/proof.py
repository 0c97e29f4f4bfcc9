"""When the run of an edited model counts as a proof of its patch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import ExactnessLost
from .lockstep import EPS
from .metrics import Comparison

SURE = 16  # units of rounding of the largest logit that deep models differ by when they sum in another order
LOOSEST = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}  # of the largest logit
SMALL = 0.1  # of the error without a patch


def require_exact(
    measured: Comparison, contextual: np.ndarray, dtype: str, unpatched: Callable[[], float] | None = None
) -> None:
    """Refuses a patch whose own run is not that of the contextual model, whatever the algebra says.

    An error of some units of rounding passes. A larger one may be ill-conditioned rounding: it passes if it is small
    beside what is wrong without the patch.

    Args:
        contextual: the logits that are wanted, `[tokens, vocabulary]`.
        unpatched: works out the error (L-inf) of the run without the patch; where there is none, only `LOOSEST` counts.

    Raises:
        ExactnessLost: with the error's size.
    """
    scale = float(np.abs(contextual).max())
    if measured.linf <= SURE * EPS[dtype] * scale:
        return
    if measured.linf <= LOOSEST[dtype] * scale and (unpatched is None or measured.linf <= SMALL * unpatched()):
        return
    raise ExactnessLost(
        f"the edited model's own run is {measured.linf:.3g} away from the contextual logits (which reach {scale:.3g}): "
        f"the plan is ill-conditioned here in {dtype}, or the model does not do in this run what it does in a short "
        "one; choose another strategy or dtype"
    )
