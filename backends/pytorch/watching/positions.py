"""The positions that a model gives its tokens: seen on the way to its blocks, not taken for granted.

A model may count them from the start, from its mask, or by what stands there (rows and columns of an image).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.traced import Traced
from ..calling.exclusive import of_this_thread
from .watcher import Finished


def own_positions(model: nn.Module, traced: Traced, run: Callable[[], Any], batch: int, tokens: int) -> Tensor | None:
    """Positions `[batch, tokens]` or `[k, batch, tokens]` with which `run` reaches the first block, int64.

    The run ends there. None for a model that shows none: it takes them from the first block's inputs in another form.
    """
    block, found = traced.blocks[0], list[Tensor]()
    parts = block.path.split(".") if block.path else []
    above = [".".join(parts[:i]) for i in range(len(parts) + 1)]

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = kwargs.get("position_ids")
        if isinstance(value, Tensor) and _are_positions(value, tokens):
            found.append(value.detach().expand(*value.shape[:-2], batch, tokens).long())

    def last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(module, args, kwargs)
        raise Finished

    modules = dict(model.named_modules())
    with ExitStack() as hooks, torch.no_grad(), suppress(Finished):
        for path in above:
            hook = last if path == block.path else look
            hooks.enter_context(modules[path].register_forward_pre_hook(of_this_thread(hook), with_kwargs=True))
        run()
    return found[0].clone() if found else None


def _are_positions(value: Tensor, tokens: int) -> bool:
    return value.dtype in (torch.int64, torch.int32) and 2 <= value.dim() <= 3 and value.shape[-1] == tokens
