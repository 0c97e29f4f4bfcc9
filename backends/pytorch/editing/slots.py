"""The parameters that a patch changes, in a model: found by name, and fit to be changed.

A slot is a parameter's name in the state dict, or `NAME[e]`: its slice `e` along the first axis (an expert).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.graph.changes import Change, MatrixChange
from blockkit.graph.graph import suggest

from ..calling.numbers import foreign
from ..watching.intercepted import bare

_SLICE = re.compile(r"^(.*)\[(\d+)\]$")


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter, or one slice of it.

    Attributes:
        parameter: its name in the state dict.
        index: of the slice; None for all of it.
        whole: the parameter's tensor.
    """

    name: str
    parameter: str
    index: int | None
    whole: Tensor

    @property
    def tensor(self) -> Tensor:
        """The numbers themselves (no copy)."""
        return self.whole.detach() if self.index is None else self.whole.detach()[self.index]


def named(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by all their names, as the model has them now."""
    return dict(model.named_parameters(remove_duplicate=False))


def find(model: nn.Module, names: Iterable[str]) -> dict[str, Slot]:
    """The slots by name.

    Raises:
        BadInput: one does not exist; the message has names that are close.
    """
    known = named(model)
    return {name: _found(model, known, name) for name in names}


def _found(model: nn.Module, known: Mapping[str, Tensor], name: str) -> Slot:
    if name in known:
        return Slot(name, name, None, bare(known[name]))
    match = _SLICE.match(name)
    if match is not None and match[1] in known:
        whole, index = bare(known[match[1]]), int(match[2])
        if whole.dim() < 2 or index >= whole.shape[0]:
            raise BadInput(f"{name}: {match[1]} has the shape {_size(whole)} and no slice {index}")
        return Slot(name, match[1], index, whole)
    if name in dict(model.named_buffers()):
        raise BadInput(f"{name} is a buffer of this {type(model).__name__}, not a parameter; it cannot be changed")
    raise BadInput(f"this {type(model).__name__} has no parameter {name!r}{suggest(name, known)}")


def require_plain(slot: Slot) -> None:
    """Refuses a parameter whose numbers are not there, or are not what they seem.

    Raises:
        BadInput: it is on the meta device, quantised, sharded, sparse, or one number of it stands for several.
    """
    whole = slot.whole
    if whole.is_meta:
        why = "is on the meta device: its numbers are not loaded"
    elif (strange := foreign(whole)) is not None:
        why = strange
    elif whole.layout is not torch.strided:
        why = f"is stored as {whole.layout}, not as a dense tensor"
    elif any(step == 0 and size > 1 for step, size in zip(whole.stride(), whole.shape, strict=True)):
        why = "is an expanded tensor: one number in memory stands for several"
    else:
        return
    raise BadInput(f"{slot.parameter} {why}; a patch can be put on plain floating-point parameters alone")


def require_fit(slot: Slot, change: Change, transposed: bool) -> None:
    """Refuses a change of another shape than the parameter has.

    Raises:
        BadInput: with both shapes.
    """
    shape = tuple(slot.tensor.shape)
    if isinstance(change, MatrixChange):
        out, inner = int(change.left.shape[-1]), int(change.right.shape[-1])
        sides = (inner, out) if transposed else (out, inner)
        fits = any((prod(shape[:k]), prod(shape[k:])) == sides for k in range(1, len(shape)))
        wanted = f"[{sides[0]}, {sides[1]}]" + (" (stored [d_in, d_out])" if transposed else "")
    else:
        width = int(change.delta.shape[-1])
        fits, wanted = prod(shape) == width, f"[{width}]"
    if not fits:
        raise BadInput(f"the patch changes {slot.name} as {wanted}, this model's has the shape {_size(slot.tensor)}")


def require_untied(model: nn.Module, slots: Iterable[Slot]) -> None:
    """Refuses parameters that share their memory with others.

    Raises:
        BadInput: with the names of both, and what can be done.
    """
    spans = [(name, span) for name, tensor in _tensors(model) if (span := _span(tensor)) is not None]
    for slot in slots:
        mine = _span(slot.whole)
        for other, span in spans:
            if other != slot.parameter and mine is not None and _overlap(mine, span):
                raise BadInput(
                    f"{slot.parameter} and {other} are tied: they share their memory, so a change of one is a change "
                    f"of the other. blockkit.backends.pytorch.editing.untie(model, {slot.parameter!r}) gives the first "
                    "memory of its own"
                )


def tied_with(model: nn.Module, name: str) -> list[str]:
    """The names of all other parameters and buffers that share memory with the parameter `name`."""
    mine = _span(find(model, [name])[name].whole)
    spans = [(other, _span(tensor)) for other, tensor in _tensors(model) if other != name]
    return [other for other, span in spans if mine is not None and span is not None and _overlap(mine, span)]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, bare(p)) for name, p in named(model).items())
    yield from model.named_buffers(remove_duplicate=False)


def _span(tensor: Tensor) -> tuple[Any, int, int] | None:
    """Device, first and last byte; None where there is no memory to speak of."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.device, start, start + (last + 1) * tensor.element_size()) if start else None


def _overlap(one: tuple[Any, int, int], other: tuple[Any, int, int]) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


def _size(tensor: Tensor) -> str:
    return str(list(tensor.shape))
