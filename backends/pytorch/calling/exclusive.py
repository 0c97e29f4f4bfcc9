"""One thread at a time for a model: what one watches, no other may edit or watch meanwhile; running it is free."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from blockkit.errors import BadInput

_holders: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_changed = threading.Condition()


@contextmanager
def sole_use(model: nn.Module, wait: bool = False) -> Iterator[None]:
    """The model and all that it holds for this thread alone; the same thread may ask again.

    Args:
        wait: until no other thread has any of it.

    Raises:
        BadInput: another thread has it.
    """
    me, modules = threading.get_ident(), list(model.modules())

    def taken() -> bool:
        return any(_holders.get(module, me) != me for module in modules)

    with _changed:
        if wait:
            _changed.wait_for(lambda: not taken())
        elif taken():
            raise BadInput(
                f"this {type(model).__name__} is absorbing, or being edited, in another thread; wait for it, or give "
                "each thread a model of its own"
            )
        mine = [module for module in modules if module not in _holders]
        _holders.update(dict.fromkeys(mine, me))
    try:
        yield
    finally:
        with _changed:
            for module in mine:
                del _holders[module]
            _changed.notify_all()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of a module that others may be running: only this thread's calls reach it."""
    me = threading.get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == me else None

    return called
