"""What a changed parameter gives: factors kept beside it, or merged into it.

Factored, a change is added to what a call gives, y = W z + U^T (V z), and no dense matrix is formed. Merged, W + U^T V
is worked out in float64, rows of it at a time, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockkit.errors import BadInput
from blockkit.graph.changes import Change, MatrixChange, VectorChange

from ..watching.intercepted import Event

HALF = (torch.bfloat16, torch.float16)
PIECE = 1 << 20  # numbers of a matrix that are worked on at a time


@dataclass(frozen=True, eq=False)
class Factors:
    """Arrays of changes as tensors, each made once for a dtype and a device; and what has to be merged to be used."""

    made: dict[tuple[int, torch.dtype, torch.device], tuple[np.ndarray, Tensor]] = field(default_factory=dict)
    whole: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)

    def of(self, array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The array's tensor."""
        key = id(array), dtype, device
        if key not in self.made:
            self.made[key] = array, torch.as_tensor(np.asarray(array), dtype=dtype, device=device)
        return self.made[key][1]

    def merged(self, name: str, parameter: Tensor, change: Change, transposed: bool) -> Tensor:
        """The changed parameter, worked out again only when its own numbers are others."""
        version = None if parameter.is_inference() else parameter._version
        state = parameter.data_ptr(), version, parameter.dtype
        if name not in self.whole or self.whole[name][0] != state:
            self.whole[name] = state, merged_value(parameter, change, transposed)
        return self.whole[name][1]


def merged_value(parameter: Tensor, change: Change, transposed: bool) -> Tensor:
    """The parameter with a static change added, in its own shape and dtype, rounded once."""
    if isinstance(change, VectorChange):
        delta = torch.as_tensor(np.asarray(change.delta), dtype=torch.float64, device=_wide_device(parameter))
        return (parameter.detach().to(delta) + delta.reshape(parameter.shape)).to(parameter)
    left, right = (np.asarray(f, np.float64) for f in (change.left, change.right))
    first, second = (right, left) if transposed else (left, right)
    device = _wide_device(parameter)
    a, b = (torch.as_tensor(f, dtype=torch.float64, device=device) for f in (first, second))
    matrix = parameter.detach().reshape(a.shape[1], b.shape[1])
    found = torch.empty_like(matrix)
    step = max(1, PIECE // b.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        found[rows] = (matrix[rows].to(device=device, dtype=torch.float64) + a[:, rows].t() @ b).to(found)
    return found.reshape(parameter.shape)


def _wide_device(parameter: Tensor) -> torch.device:
    """Where float64 can be worked in: the parameter's own device, except for those without float64."""
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device


def changed_result(
    event: Event,
    changes: Mapping[str, Change],
    transposed: Collection[str],
    batch: int,
    stored: Callable[[str], Tensor],
    factors: Factors,
) -> Tensor:
    """What the call gives when its parameters are changed, the changes kept as factors.

    Args:
        changes: by name; one with `per_token` holds a row for each token of the batch, or one for each sequence.
        transposed: the names of those stored as `[d_in, d_out]`.
        batch: how many sequences the call works on.
        stored: the parameters as they are.
        factors: where the changes' arrays become tensors, once.
    """
    whole: dict[str, Tensor] = {}
    beside: list[str] = []
    for name, change in changes.items():
        if isinstance(change, MatrixChange):
            fits = event.product(name) is not None
        else:  # a parameter of 16 bits would round it
            width = event.output.shape[-1] == np.size(change.delta)
            fits = stored(name).dtype in HALF and width and _slope(event, name, stored(name)) is not None
        if change.per_token or fits:
            beside.append(name)
        else:
            whole[name] = factors.merged(name, stored(name), change, name in transposed)
    output = event.with_values(whole) if whole else event.output
    for name in beside:
        more = _added(event, name, changes[name], batch, output, stored, factors)
        output = (output.to(more.dtype) + more).to(output.dtype)
    return output


def _added(
    event: Event,
    name: str,
    change: Change,
    batch: int,
    output: Tensor,
    stored: Callable[[str], Tensor],
    factors: Factors,
) -> Tensor:
    """What a change kept beside its parameter adds to the call's result."""
    if isinstance(change, MatrixChange):
        product = event.product(name)
        if product is None:
            raise BadInput(f"{name} is not read as a matrix product, so it cannot have a value for each token")
        z = product.z.to(wide_dtype(product.z))
        left, right = (factors.of(f, z.dtype, z.device) for f in (change.left, change.right))
        if not change.per_token:
            return (z @ right.t()) @ left
        right, left = (_placed(f, z, batch, name) for f in (right, left))
        return (z * right).sum(-1, keepdim=True) * left
    delta = factors.of(change.delta, wide_dtype(output), output.device)
    rows = _placed(delta, output, batch, name) if change.per_token else delta
    slope = _slope(event, name, stored(name))
    if slope is None:
        raise BadInput(f"the result does not grow evenly with {name}, so it cannot have a value for each token")
    return rows * slope.to(rows.dtype)


def _placed(rows: Tensor, value: Tensor, batch: int, name: str) -> Tensor:
    """Rows for each token, or each sequence, so that they fit `value [..., width]`."""
    tokens = value.numel() // value.shape[-1]
    if len(rows) == tokens:
        return rows.reshape(*value.shape[:-1], -1)
    if len(rows) == batch and value.shape[0] == batch:
        return rows.reshape(batch, *[1] * (value.dim() - 2), -1)
    if len(rows) == batch and value.dim() == 2 and not tokens % batch:  # the batch folded into the tokens' axis
        return rows.repeat_interleave(tokens // batch, 0)
    raise BadInput(
        f"the patch holds {len(rows)} rows for {name}, one for each token (or sequence) that it was made for; "
        f"this run has {tokens}"
    )


def _slope(event: Event, name: str, parameter: Tensor) -> Tensor | None:
    """By what a vector is multiplied on its way to the result, `[..., width]`: the result grows by slope * delta.

    None if the result does not grow evenly with it.
    """
    wide = wide_dtype(event.output)
    values = (torch.full_like(parameter, float(n)) for n in range(3))
    never, once, twice = (event.with_values({name: value}, wide) for value in values)
    slope: Tensor = once - never
    even = ((twice - once - slope).abs() <= 1e-2 * slope.abs().max()).all()
    return slope if bool(even) else None


def wide_dtype(value: Tensor) -> torch.dtype:
    """In which a change is added to a call's result, so that it is rounded once: the next wider one, where there is."""
    return torch.float32 if value.dtype in HALF or value.device.type == "mps" else torch.float64
