"""What an edited checkpoint is to give, and a run of the written files that shows whether it does.

The files are run in arithmetics in which the patch was *not* solved: in float64, and in the dtype that the checkpoint
is stored in. A patch that holds in one arithmetic alone is off in both, as it will be in another program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..checkpoint.dtypes import NARROW
from ..checkpoint.model import Model
from ..errors import ExactnessLost
from .algorithm import Absorbed
from .executor import reference, streamed
from .lockstep import EPS
from .measure import recomputed
from .metrics import compare
from .proof import LOOSEST, SURE
from .run import logits_of, run_stream

WIDE = "float64"


@dataclass(frozen=True)
class Promise:
    """The contextual run at the served tokens, in few enough numbers to be kept with a patch.

    Attributes:
        contextual: the residual stream after the last block, `[served, d_model]`, by the dtype of the run; what
            remains of the model turns it into logits, and no patch changes that.
        floors: the recompute floor (L-inf of the logits) by dtype.
    """

    contextual: Mapping[str, np.ndarray]
    floors: Mapping[str, float]


@dataclass(frozen=True)
class Proved:
    """How far the written files' run is from the contextual logits.

    Attributes:
        linf: the largest difference, by the dtype of the run.
        floor: the recompute floor of the coarsest dtype at hand; None where it was not measured.
        dtype: that dtype.
        exact: whether no difference is more than rounding makes; if not, it is small, and no more is claimed.
    """

    linf: Mapping[str, float]
    floor: float | None
    dtype: str
    exact: bool


def narrow_dtypes(model: Model) -> tuple[str, ...]:
    """The dtypes of 16 bits in which some of the model's blocks are stored."""
    return tuple(sorted(NARROW[d] for d in model.stored_dtypes(model.parts) & NARROW.keys()))


def promised(model: Model, absorbed: Absorbed, dtype: str, floor: float) -> Promise:
    """What the patch of an absorbed context is to give, also in the dtype in which the model is stored.

    Args:
        dtype, floor: of the run that absorbed it.
    """
    request = absorbed.request
    streams, floors = {dtype: absorbed.stream}, {dtype: floor}
    for narrow in narrow_dtypes(model) if request.merge else ():
        if narrow == dtype:
            continue
        executor = reference(model, narrow)
        everything = np.concatenate([request.context, request.query])
        stream = run_stream(executor, everything, np.arange(len(everything)))[-len(request.served) :]
        pairs = recomputed(executor, request, logits_of(executor, stream))
        streams[narrow], floors[narrow] = executor.host(stream), max(compare(*pair).linf for pair in pairs)
    return Promise({k: np.asarray(v, np.float32) for k, v in streams.items()}, floors)


def prove(model: Model, promise: Promise, query: np.ndarray, positions: np.ndarray, dtype: str) -> Proved:
    """Runs the written model on the query, `[tokens]` ids at `positions`, and compares.

    Args:
        model: opened from the written files.
        dtype: in which the patch was solved.

    Raises:
        ExactnessLost: with the size of the error, and what would be allowed.
    """
    narrow = narrow_dtypes(model)
    coarsest = max((dtype, *narrow), key=EPS.__getitem__)
    floor = promise.floors.get(coarsest)
    found: dict[str, float] = {}
    exact = True
    for running in (WIDE, *narrow):
        executor = streamed(model, running)
        kept = promise.contextual.get(running, promise.contextual[dtype])
        wanted = logits_of(executor, executor.arrays.asarray(kept, running))
        own = logits_of(executor, run_stream(executor, query, positions)[-len(kept) :])
        found[running] = compare(own, wanted).linf
        scale = float(np.abs(wanted).max())
        allowed = _allowed(coarsest, floor, scale)
        exact = exact and found[running] <= (
            allowed if coarsest in NARROW.values() else max(10 * (floor or 0.0), SURE * EPS[dtype] * scale)
        )
        if not found[running] <= allowed:
            raise ExactnessLost(
                f"the edited checkpoint, run in {running}, is {found[running]:.3g} away from the contextual logits; "
                f"{allowed:.3g} would be rounding there. The patch holds in the arithmetic in which it was found "
                "and is too sensitive for another program; choose another strategy (stable is the least sensitive)"
            )
    return Proved(found, floor, coarsest, exact)


def _allowed(dtype: str, floor: float | None, scale: float) -> float:
    """How far apart two runs may be: twice the floor in 16 bits, or one unit of rounding of the largest logit."""
    if dtype in NARROW.values():
        return max(2 * (floor or 0.0), EPS[dtype] * scale)
    return LOOSEST[dtype] * scale
