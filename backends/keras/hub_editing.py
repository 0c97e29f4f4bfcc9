"""Patches on a KerasHub model's own variables: put on, read back, and taken off to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from keras import ops

from blockkit.errors import BadInput
from blockkit.graph.arrays import wide_dtype
from blockkit.graph.changes import Change, dense, shape_of
from blockkit.patch.in_place import ChangedParameter, Receipt
from blockkit.patch.patch import Patch

from .hub_architecture import described
from .hub_storage import Stored, host, names


@dataclass(frozen=True)
class _Applied:
    """A patch that lies on a model; the variables that it changed, and what each of them held before."""

    patch: Patch
    originals: tuple[tuple[Any, np.ndarray], ...]


_applied: WeakKeyDictionary[Any, list[_Applied]] = WeakKeyDictionary()  # by model, the last one on top


def variables(model: Any) -> dict[str, Stored]:
    """Every parameter of a KerasHub model by the name that patches have for it.

    Raises:
        BadInput: the model is not one that can be patched.
    """
    stored = described(model, tokens=1).stored
    return {name: stored[slot] for slot, name in names(model, stored).items()}


def fingerprint(model: Any, stored: Mapping[str, Stored], changed: Iterable[str]) -> dict[str, str]:
    """What a patch must find again: the architecture, and the weights that it was made for.

    Values are hashed in float32, so that a patch made on one Keras backend fits the same model on another.
    """
    digest = hashlib.sha256()
    for name in sorted(changed):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(stored[name].read(), np.float32).tobytes())
    return {"architecture": type(model.backbone).__name__, "weights": digest.hexdigest()}


def apply(patch: Patch, model: Any, merge: bool) -> Receipt:
    """Merges a patch into the model's variables, or leaves the model wholly as it was; see `InPlace.apply`.

    Raises:
        BadInput: `merge` is false, the patch is for another model, or it is on this one already.
    """
    if not merge:
        raise BadInput("a KerasHub model has no place for factors beside its weights; apply the patch with merge=True")
    patch.require_mergeable()
    stored = variables(model)
    check(patch, model)
    originals = tuple((stored[name].variable, host(stored[name].variable)) for name in patch.changes)
    try:
        changed = [_merge(name, stored[name], change) for name, change in patch.changes.items()]
        _applied.setdefault(model, []).append(_Applied(patch, originals))
    except BaseException:
        _put_back(originals)
        raise
    return Receipt(tuple(changed), patch.validity)


def remove(patch: Patch, model: Any) -> None:
    """Puts back what the variables held before the patch; see `InPlace.remove`.

    Raises:
        BadInput: the patch is not on the model, or another one lies above it.
    """
    lying = _applied.get(model, [])
    if not any(one.patch is patch for one in lying):
        raise BadInput(f"the patch is not on {model.name}: nothing is there to remove")
    if lying[-1].patch is not patch:
        above = len(lying) - 1 - max(i for i, one in enumerate(lying) if one.patch is patch)
        raise BadInput(f"{above} other patch(es) lie above it on {model.name}; remove the last one applied first")
    held = {id(variable) for variable in model.variables}
    if gone := [variable.path for variable, _ in lying[-1].originals if id(variable) not in held]:
        raise BadInput(f"{model.name} does not hold {', '.join(gone[:4])} any more; it was rebuilt after the patch")
    _put_back(lying[-1].originals)
    lying.pop()


def _put_back(originals: Iterable[tuple[Any, np.ndarray]]) -> None:
    for variable, value in originals:
        variable.assign(value)


def check(patch: Patch, model: Any) -> None:
    """Refuses a model for which the patch was not made; see `InPlace.check`.

    Raises:
        BadInput: its class, a variable's name or shape, or the weights that change differ.
    """
    stored = variables(model)
    mine, its = patch.made_for.get("architecture"), type(model.backbone).__name__
    if mine != its:
        raise BadInput(f"the patch was made for {mine}, this model ({model.name}) is a {its}")
    for name, change in patch.changes.items():
        if name not in stored:
            raise BadInput(f"the patch changes {name}, which this model ({model.name}) does not have")
        if (shape := shape_of(change)) != stored[name].shape:
            raise BadInput(
                f"the patch's change of {name} has the shape {shape}, {model.name}'s is {stored[name].shape}"
            )
    if missing := [name for name in patch.fingerprinted if name not in stored]:
        raise BadInput(f"the patch was made for a model with {missing[0]}, which this one ({model.name}) has not")
    if fingerprint(model, stored, patch.fingerprinted)["weights"] != patch.made_for.get("weights"):
        raise BadInput(
            f"the patch was made for other weights than {model.name} has now: the hash of the weights that it changes "
            "differs (is it, or another patch, on the model already?)"
        )


def _merge(name: str, stored: Stored, change: Change) -> ChangedParameter:
    """Gives one variable its new values, and reads them back."""
    variable, before = stored.variable, stored.read().astype(np.float64)
    after, wide = dense(before, change), wide_dtype(str(variable.dtype))
    meant = ops.cast(ops.convert_to_tensor(stored.laid_out(after), wide), variable.dtype)
    wanted = host(meant).astype(np.float64)
    if not np.isfinite(wanted).all():
        raise BadInput(f"{name}: its new values are no numbers in {variable.dtype}; nothing was changed")
    variable.assign(meant)
    residual = float(np.abs(host(variable).astype(np.float64) - wanted).max())
    delta, shape = after - before, tuple(int(n) for n in variable.shape)
    return ChangedParameter(
        name, shape, str(variable.dtype), "merged", float(np.abs(delta).max()), float(np.linalg.norm(delta)), residual
    )
