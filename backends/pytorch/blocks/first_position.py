"""Where a model's positions begin: some count from 0, some from behind their padding id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calling.interface import Interface, logits_of
from ..calling.token_rows import close

MOST = 8  # beginnings that are tried


def first_position(model: nn.Module, interface: Interface, ids: Tensor, more: Mapping[str, Any]) -> int:
    """The position of the first token where a model is told none: the beginning with which it gives the same logits.

    0 for a model that takes no positions, or does not heed them.

    Args:
        more: what else the model has to be called with.
    """
    if "position_ids" not in interface.takes or ids.is_floating_point():
        return 0
    counted = torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.no_grad():
        try:
            plain = _logits(model, interface, ids, None, more)
        except Exception:  # it does not run on so short an input: what it is called with later will tell why
            return 0
        for first in range(MOST):
            try:
                if close(_logits(model, interface, ids, counted + first, more), plain, 1e-4):
                    return first
            except Exception:  # beyond the table of positions
                break
    return 0


def _logits(
    model: nn.Module, interface: Interface, ids: Tensor, positions: Tensor | None, more: Mapping[str, Any]
) -> Tensor:
    args, kwargs = interface.inputs(ids, position_ids=positions, use_cache=False)
    return logits_of(model(*args, **{**kwargs, **more})).float()
