"""Parameters intercepted in a model: what stands in their places, and how they come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.graph.graph import suggest

from .intercepted import Handler, Intercepted, OfThread, bare


@contextmanager
def intercepting(model: nn.Module, names: Sequence[str], handler: Handler) -> Iterator[None]:
    """The model with the named parameters intercepted; the very same parameters are back afterwards.

    Other threads that run it meanwhile run it with the parameters themselves.

    A parameter that several modules share is intercepted in all of them, under the name that is given here.

    Raises:
        BadInput: the model has no such parameter.
    """
    restore = intercept(model, names, OfThread(handler))
    try:
        yield
    finally:
        restore()


def intercept(model: nn.Module, names: Sequence[str], handler: Handler) -> Callable[[], list[str]]:
    """Puts `Intercepted` in the parameters' places for good; gives what puts the parameters back.

    Where something else has been put in the meantime, that stays; their names are given back.

    Raises:
        BadInput: the model has no such parameter.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    made: dict[Any, Intercepted] = {}
    for name in names:
        if name not in known:
            raise BadInput(f"the model has no parameter {name!r}{suggest(name, known)}")
        made.setdefault(_place(known[name]), Intercepted.of(known[name], name, handler))
    replaced: list[tuple[Any, Any, Tensor, Intercepted]] = []

    def restore() -> list[str]:
        exchanged = []
        while replaced:  # each is forgotten when it is back, so that what breaks in can be followed by another try
            holder, key, parameter, stand_in = replaced[-1]
            if _stands(holder, key) is stand_in:
                holder[key] = parameter
            else:
                exchanged.append(stand_in.roots[0])
            replaced.pop()
        return exchanged

    try:
        for holder, key, parameter in list(_held(model)):
            if (stand_in := made.get(_place(parameter))) is not None:
                replaced.append((holder, key, parameter, stand_in))
                holder[key] = stand_in
    except BaseException:
        restore()
        raise
    return restore


def _stands(holder: Any, key: Any) -> Any:
    return holder.get(key) if isinstance(holder, dict) else holder[key] if key < len(holder) else None


def uncover(model: nn.Module, handler: Handler) -> None:
    """Puts the parameters back that stand under a handler, as in a copy of a model that was made meanwhile."""
    for holder, key, parameter in list(_held(model)):
        if isinstance(parameter, Intercepted) and parameter.handler is handler:
            holder[key] = parameter.plain


def _held(model: nn.Module) -> Iterator[tuple[Any, Any, Tensor]]:
    """Every place where a module keeps a parameter: its own table, and lists beside it (as recurrent layers have)."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module._parameters, key, parameter
        for value in vars(module).values():
            if type(value) is list:
                yield from ((value, i, p) for i, p in enumerate(value) if isinstance(p, nn.Parameter))


def _place(tensor: Tensor) -> Any:
    """Equal for tensors that are the same numbers in the same memory."""
    plain = bare(tensor)
    if plain.is_meta or plain.layout is not torch.strided or not plain.numel() or not plain.data_ptr():
        return id(plain)
    return plain.data_ptr(), tuple(plain.shape), plain.stride(), plain.dtype
