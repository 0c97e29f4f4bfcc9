"""Code that names a precision (`.to(torch.bfloat16)`), run in float32 all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {Tensor.bfloat16, Tensor.half, Tensor.double}


class SinglePrecision(TorchFunctionMode):
    """Whatever is cast, or made, in another precision meanwhile is float32: a block's copy computes in nothing else."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].float()
        named = {name: _single(value) for name, value in (kwargs or {}).items()}
        return func(*map(_single, args), **named)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Numbers that name no dtype are float32, as in a copy of a block; the default is one for the whole process."""
    before = torch.get_default_dtype()
    if before is torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _single(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value
