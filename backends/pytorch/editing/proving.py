"""A patch on a model for the thread that proves it: other threads run the model without it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blockkit.patch.patch import Patch

from ..calling.exclusive import sole_use
from ..watching.intercepted import Intercepted, OfThread
from ..watching.interception import intercept
from .editor import Factored, by_parameter, merged_values, whole_value
from .slots import find, named


@contextmanager
def worn(patch: Patch, model: nn.Module) -> Iterator[None]:
    """The model as an ordinary run of this thread sees it with the patch: merged, or with its factors beside.

    Raises:
        BadInput: a weight does not hold its merged change.
    """
    slots = find(model, patch.changes)
    parameters = by_parameter(slots)
    with sole_use(model):
        if patch.merged:
            with torch.inference_mode(False), torch.no_grad():
                known, values = named(model), merged_values(patch, slots)
                under = {name: _under(known[name], whole_value(own, values)) for name, own in parameters.items()}
            handler = OfThread(values=under)
        else:
            handler = OfThread(Factored.of(patch, parameters))
        restore = intercept(model, list(parameters), handler)
        try:
            yield
        finally:
            restore()


def _under(stands: Tensor, value: Tensor) -> Tensor:
    """The value in a parameter's place, under whatever lies on the parameter."""
    if isinstance(stands, Intercepted):
        return Intercepted.of(_under(stands.plain, value), stands.roots[0], stands.handler)
    return nn.Parameter(value, requires_grad=False)
