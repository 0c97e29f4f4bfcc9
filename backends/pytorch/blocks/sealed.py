"""Modules that `torch.export` cannot trace, inside a block that it can: sealed, so that they pass as one operation.

A loop over the experts that were chosen, say, depends on numbers. Sealed, such a module is one operation of the
exported program that can still be run, so that it can be seen whether it looks across tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..calling.interface import leaves
from .single_precision import SinglePrecision
from .unheard import unheard

_SEALED: WeakValueDictionary[int, Sealed] = WeakValueDictionary()


class Sealed(nn.Module):
    """A module whose calls are one operation of an exported program."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.within = [module]  # in a list, so that its parameters are not this module's
        self.args, self.kwargs = args, kwargs
        with torch.no_grad(), SinglePrecision():
            self.example = module(*args, **kwargs)
        _SEALED[id(self)] = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, by way of the operation."""
        self.args, self.kwargs = args, kwargs
        given = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        return filled(self.example, iter(_operation()(given, id(self))))

    def run(self, given: list[Tensor]) -> list[Tensor]:
        """The tensors of the result for other tensors among the arguments."""
        values = iter(given)
        args, kwargs = filled((self.args, self.kwargs), values)
        with SinglePrecision():
            result = self.within[0](*args, **kwargs)
        return [v.clone() for v in leaves(result) if isinstance(v, Tensor)]


def filled(value: Any, tensors: Any) -> Any:
    """The same nest with other tensors, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {k: filled(v, tensors) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [filled(v, tensors) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@cache
def _operation() -> Callable[[list[Tensor], int], list[Tensor]]:
    """The operation, made when it is first needed."""

    def sealed(given: list[Tensor], key: int) -> list[Tensor]:
        return _SEALED[key].run(given)

    def shapes(given: list[Tensor], key: int) -> list[Tensor]:
        found = [v for v in leaves(_SEALED[key].example) if isinstance(v, Tensor)]
        return [given[0].new_empty(v.shape, dtype=v.dtype) for v in found]

    sealed.__annotations__ = {"given": list[Tensor], "key": int, "return": list[Tensor]}
    made = torch.library.custom_op("blockkit::sealed", sealed, mutates_args=())
    made.register_fake(shapes)
    return made


def seal(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Seals the smallest modules within `twin` that cannot be traced; whether there were any."""
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, named: Any) -> None:
            calls.setdefault(path, (module, given, named))

        return hook

    with ExitStack() as hooks, torch.no_grad(), SinglePrecision():
        for path, module in twin.named_modules():
            if path:
                hooks.enter_context(module.register_forward_pre_hook(note(path), with_kwargs=True))
        twin(*args, **kwargs)
    blocked = _blocked("", calls)
    for path in blocked:
        twin.set_submodule(path, Sealed(*calls[path]))
    return bool(blocked)


def _blocked(parent: str, calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]) -> list[str]:
    """The smallest modules below `parent` that cannot be traced by themselves."""
    below = [p for p in calls if p.startswith(f"{parent}." if parent else "") and p != parent]
    children = [p for p in below if not any(q != p and p.startswith(f"{q}.") for q in below)]
    found = []
    for path in children:
        if not _traceable(*calls[path]):
            found.extend(_blocked(path, calls) or [path])
    return found


def _traceable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        program(module, args, kwargs)
    except Exception:
        return False
    return True


def program(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module as an exported program; what torch logs on the way is left unsaid."""
    with unheard(), torch.no_grad():
        with SinglePrecision():
            traced = torch.export.export(module, args, kwargs, strict=False)
        return traced.run_decompositions({})
