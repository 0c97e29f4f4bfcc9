"""One thread at a time for a model: what one watches, no other may edit or watch meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from blockkit.errors import BadInput

_holders: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def sole_use(model: nn.Module) -> Iterator[None]:
    """The model for this thread alone; the same thread may ask again.

    Raises:
        BadInput: another thread has it.
    """
    me = threading.get_ident()
    with _lock:
        holder = _holders.get(model)
        if holder not in (None, me):
            raise BadInput(
                f"this {type(model).__name__} is absorbing, or being edited, in another thread; wait for it, or give "
                "each thread a model of its own"
            )
        _holders[model] = me
    try:
        yield
    finally:
        if holder is None:
            with _lock:
                del _holders[model]
