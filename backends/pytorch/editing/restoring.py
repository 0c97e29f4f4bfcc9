"""Taking a merged patch off: what stands in its parameters' places is looked at before anything is put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.patch.patch import Patch

from ..watching.intercepted import bare
from .changed import HALF, merged_value
from .receipts import said, some
from .slots import Slot, named


class NoLongerOn(BadInput):
    """None of the parameters holds what the patch put there, so there is nothing to take off."""


@dataclass(frozen=True, eq=False)
class Original:
    """What a parameter held before a patch was merged into it.

    Attributes:
        parameter: its name then.
        values: its numbers then.
        slots: what the patch changed of it.
        itself: the parameter; a model that is wrapped meanwhile gives it another name.
    """

    parameter: str
    values: Tensor
    slots: tuple[Slot, ...]
    itself: weakref.ref[Tensor]

    @staticmethod
    def of(parameter: str, slots: Iterable[Slot]) -> Original:
        """Before anything is changed."""
        found = tuple(slots)
        whole = found[0].whole
        return Original(parameter, whole.data, found, weakref.ref(whole))

    def standing(self, known: Mapping[str, Tensor]) -> Tensor:
        """The parameter as the model has it now.

        Raises:
            BadInput: it has none of that name, nor the parameter itself under another one.
        """
        if self.parameter in known:
            return bare(known[self.parameter])
        itself = self.itself()
        if itself is not None and any(bare(p) is itself for p in known.values()):
            return itself
        raise BadInput(f"the model has no parameter {self.parameter} any more, nor what it was under another name")

    def merged(self, patch: Patch) -> Tensor:
        """What the patch made of it."""
        changed = self.values.detach().clone()
        for slot in self.slots:
            before = changed if slot.index is None else changed[slot.index]
            before.copy_(merged_value(before, patch.changes[slot.name], slot.name in patch.transposed))
        return changed


def restore(patch: Patch, model: nn.Module, originals: Iterable[Original]) -> None:
    """Puts every original back, or leaves the model wholly as it is.

    Raises:
        NoLongerOn: all parameters hold other numbers, which stay.
        BadInput: some do, or a parameter has another shape, dtype or device.
    """
    known = named(model)
    places = {o.parameter: (o, o.standing(known)) for o in originals}
    for name, (original, found) in places.items():
        was = original.values
        if (found.shape, found.dtype, found.device) != (was.shape, was.dtype, was.device):
            raise BadInput(
                f"{name} was {list(was.shape)} {was.dtype} on {was.device} when the patch was put on, and is "
                f"{list(found.shape)} {found.dtype} on {found.device} now; bring it back (.to), then remove the patch"
            )
    kept = {name for name, (o, found) in places.items() if _is(found.data, o.merged(patch))}
    others = [n for n, (o, found) in places.items() if n not in kept and not torch.equal(found.data, o.values)]
    if others and not kept:
        raise NoLongerOn(
            f"{said(patch)} is no longer on this {type(model).__name__}: {some(others)} hold other numbers than it put "
            "there (loaded, or trained, since), and were left as they are"
        )
    if others:
        raise BadInput(
            f"{some(others)} hold other numbers than {said(patch)} put there (loaded, or trained, since), and "
            f"{some(kept)} still hold it, so nothing was changed; load all of the model's weights anew, then remove it"
        )
    for original, found in places.values():
        found.data = original.values


def _is(found: Tensor, meant: Tensor) -> bool:
    """Whether the numbers are those, perhaps cast to a narrower dtype and back on the way."""
    return torch.equal(found, meant) or any(torch.equal(found, meant.to(d).to(meant.dtype)) for d in HALF)
