"""Values as rows: one vector for each token, wherever the token axis stands in a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOKENS_FIRST = -1  # as a token axis: the first, with the batch's right behind it or folded into it


def token_axis(value: Any, tokens: int) -> int | None:
    """The axis of the tokens, where exactly one has their number; None otherwise."""
    if not isinstance(value, Tensor):
        return None
    found = [i for i, size in enumerate(value.shape) if size == tokens]
    return found[0] if len(found) == 1 else None


def rows_of(value: Tensor, axis: int) -> Tensor:
    """`[..., tokens, ...]` -> `[tokens, width]`, what stands beside the tokens in its order."""
    moved = value.movedim(axis, 0)
    return moved.reshape(moved.shape[0], -1)


def batch_rows(value: Tensor, axis: int, batch: int) -> Tensor:
    """The same for a run with a batch: `[batch, tokens, width]`.

    The batch stands before the tokens, as an axis of its own or folded into theirs; behind them where the axis is
    `TOKENS_FIRST`.
    """
    if axis == TOKENS_FIRST:
        tokens = value.shape[0] if value.dim() > 2 and value.shape[1] == batch else value.shape[0] // batch
        return value.reshape(tokens, batch, -1).movedim(0, 1)
    if axis and value.shape[0] == batch:
        moved = value.movedim(axis, 1)
        return moved.reshape(moved.shape[0], moved.shape[1], -1)
    if axis and batch == 1:
        return rows_of(value, axis)[None]
    moved = value.movedim(axis, 0)
    return moved.reshape(batch, moved.shape[0] // batch, -1)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two values are equal up to float32 rounding; what is not finite has to be the same."""
    if found.shape != wanted.shape:
        return False
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    finite = wanted[wanted.isfinite()].abs()
    size = finite.max() if finite.numel() else wanted.new_zeros(())
    return bool((same | ((found - wanted).abs() <= tolerance * size)).all())
