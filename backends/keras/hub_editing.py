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
from blockkit.fingerprint import leaf, root
from blockkit.graph.arrays import wide_dtype
from blockkit.graph.changes import Change, dense, shape_of
from blockkit.patch.in_place import ChangedParameter, Receipt
from blockkit.patch.patch import ALLOWED, Patch

from .hub_architecture import described
from .hub_storage import Stored, host, names


@dataclass(frozen=True)
class _Applied:
    """A patch that lies on a model; the variables that it changed, what each of them held before, and holds since."""

    patch: Patch
    originals: tuple[tuple[Any, np.ndarray], ...]
    merged: tuple[np.ndarray, ...]


_applied: WeakKeyDictionary[Any, list[_Applied]] = WeakKeyDictionary()  # by model, the last one on top


def variables(model: Any) -> dict[str, Stored]:
    """Every parameter of a KerasHub model by the name that patches have for it.

    Raises:
        BadInput: the model is not one that can be patched.
    """
    stored = described(model, tokens=1).stored
    return {name: stored[slot] for slot, name in names(model, stored).items()}


COVERS = "every variable of the Keras model, in float32"


def fingerprint(model: Any) -> dict[str, str]:
    """What a patch must find again: the architecture, and all values that it was made for.

    Values are hashed in float32, so that a patch made on one Keras backend fits the same model on another.
    """
    leaves: dict[str, str] = {}
    for number, variable in enumerate(model.variables):
        value = np.ascontiguousarray(host(variable), np.float32)
        leaves[f"{number:06}"] = leaf("float32", value.shape, [value.tobytes()])
    return {"architecture": type(model.backbone).__name__, "covers": COVERS, "digest": root(leaves)}


def digest_of(stored: Mapping[str, Stored], changed: Iterable[str]) -> str:
    """The digest of some variables' values alone, as patch files of format 1 hold it."""
    digest = hashlib.sha256()
    for name in sorted(changed):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(stored[name].read(), np.float32).tobytes())
    return digest.hexdigest()


def apply(patch: Patch, model: Any, merge: bool, allow_other_weights: bool = False) -> Receipt:
    """Merges a patch into the model's variables, or leaves the model wholly as it was; see `InPlace.apply`.

    Raises:
        BadInput: `merge` is false, the patch is for another model, or it is on this one already.
    """
    if not merge:
        raise BadInput("a KerasHub model has no place for factors beside its weights; apply the patch with merge=True")
    patch.require_mergeable()
    if any(one.patch.same_as(patch) for one in _applied.get(model, [])):
        raise BadInput(f"the patch is on {model.name} already")
    stored = variables(model)
    same = check(patch, model, allow_other_weights)
    originals = tuple((stored[name].variable, host(stored[name].variable)) for name in patch.changes)
    try:
        changed = [_merge(name, stored[name], change) for name, change in patch.changes.items()]
        merged = tuple(host(variable) for variable, _ in originals)
        _applied.setdefault(model, []).append(_Applied(patch, originals, merged))
    except BaseException:
        _put_back(originals)
        raise
    return Receipt(tuple(changed), patch.validity_on(same), same and patch.whole)


def remove(patch: Patch, model: Any) -> None:
    """Puts back what the variables held before the patch; see `InPlace.remove`.

    Raises:
        BadInput: the patch is not on the model (any more), or another one lies above it.
    """
    lying = _applied.get(model, [])
    if not any(one.patch.same_as(patch) for one in lying):
        raise BadInput(f"the patch is not on {model.name}: nothing is there to remove")
    if not lying[-1].patch.same_as(patch):
        above = len(lying) - 1 - max(i for i, one in enumerate(lying) if one.patch.same_as(patch))
        raise BadInput(f"{above} other patch(es) lie above it on {model.name}; remove the last one applied first")
    held = {id(variable) for variable in model.variables}
    if gone := [variable.path for variable, _ in lying[-1].originals if id(variable) not in held]:
        raise BadInput(f"{model.name} does not hold {', '.join(gone[:4])} any more; it was rebuilt after the patch")
    _require_standing(model, lying)
    _put_back(lying[-1].originals)
    lying.pop()


def _require_standing(model: Any, lying: list[_Applied]) -> None:
    """Refuses to put old values over others than the patch's; a patch of which nothing is left is forgotten."""
    top = lying[-1]
    states = [
        "patch"
        if np.array_equal(now := host(variable), merged)
        else "before"
        if np.array_equal(now, before)
        else "other"
        for (variable, before), merged in zip(top.originals, top.merged, strict=True)
    ]
    others = [v.path for (v, _), state in zip(top.originals, states, strict=True) if state == "other"]
    if others and "patch" not in states:
        lying.pop()
        raise BadInput(
            f"the patch is no longer on {model.name}: {', '.join(others[:4])} hold other numbers than it put there "
            "(loaded, or trained, since), and were left as they are"
        )
    if others:
        raise BadInput(
            f"{', '.join(others[:4])} of {model.name} hold other numbers than the patch put there (loaded, or trained, "
            "since), so nothing was changed; load all of the model's weights anew, then remove it"
        )


def _put_back(originals: Iterable[tuple[Any, np.ndarray]]) -> None:
    for variable, value in originals:
        variable.assign(value)


def check(patch: Patch, model: Any, allow_other_weights: bool = False) -> bool:
    """Refuses a model for which the patch was not made; gives whether its values are those it was made for.

    Raises:
        BadInput: its class, a variable's name or shape, or any value differs and that is not allowed.
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
    if "digest" in patch.made_for:
        same = fingerprint(model)["digest"] == patch.made_for["digest"]
    else:
        same = digest_of(stored, patch.changes) == patch.made_for.get("weights")
    if not same and not allow_other_weights:
        raise BadInput(
            f"the patch was made for other weights than {model.name} has now: the digest of its variables differs "
            f"(is it, or another patch, on the model already?). {ALLOWED}"
        )
    return same


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
