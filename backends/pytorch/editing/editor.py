"""A patch put on a model that is in memory, and taken off again.

Everything is checked before anything is changed, and whatever fails on the way leaves the model as it was, byte for
byte: the originals are kept, never worked out again. Several patches lie on a model like plates: the last one that was
put on is the first that comes off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.graph.changes import Change, MatrixChange
from blockkit.patch.in_place import Receipt
from blockkit.patch.patch import Patch

from ..calling.exclusive import sole_use
from ..watching.intercepted import Event, Intercepted
from ..watching.interception import intercept, uncover
from .changed import Factors, changed_result, merged_value
from .receipts import row, said, some
from .slots import Slot, find, named, require_fit, require_plain, require_untied, tied_with


@dataclass(frozen=True, eq=False)
class Applied:
    """A patch that lies on a model, and how it is taken off."""

    patch: Patch
    restore: Callable[[nn.Module], None]


WORDS = (4096, 4093)  # of the weights that are hashed at a time
_APPLIED: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()


# -- which model a patch is for --------------------------------------------------------------------


def fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What a patch of these slots must find again.

    Returns:
        `architecture`: the class, and a hash of all parameters' names, shapes and dtypes;
        `weights`: a hash of sums over the slots' words, and of the changes kept beside them.

    Raises:
        BadInput: a slot does not exist, or its numbers are not there.
    """
    digest = hashlib.sha256()
    parameters = named(model)
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
    weights = hashlib.sha256()
    for name, slot in sorted(find(model, names).items()):
        require_plain(slot)
        weights.update(f"{name} {list(slot.tensor.shape)} {slot.tensor.dtype}\n".encode())
        _hash(weights, slot.tensor)
        above = parameters[slot.parameter]
        while isinstance(above, Intercepted):
            if isinstance(above.handler, Factored):
                weights.update(above.handler.digest(slot.parameter))
            above = above.plain
    kind = type(model)
    return {
        "architecture": f"{kind.__module__}.{kind.__qualname__} {digest.hexdigest()[:16]}",
        "weights": weights.hexdigest(),
    }


def _hash(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Adds sums of the tensor's words by their places modulo two numbers without a common factor.

    No single change leaves them alone, and no exchange of rows does. They are read at the speed of memory, so that a
    patch of a large model costs no more than a look at its weights.
    """
    flat = tensor.contiguous().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    for words in WORDS:
        rest = len(flat) % words
        sums = flat[: len(flat) - rest].reshape(-1, words).sum(0, dtype=torch.int64)
        digest.update(sums.cpu().numpy().tobytes())
        digest.update(flat[len(flat) - rest :].cpu().numpy().tobytes())


def check(patch: Patch, model: nn.Module) -> dict[str, Slot]:
    """Refuses a model for which the patch was not made, or whose parameters cannot be changed; gives the slots.

    Raises:
        BadInput: a slot does not exist, has another shape, is quantised, not loaded or tied, or the weights differ.
    """
    slots = find(model, patch.changes)
    for name, slot in slots.items():
        require_plain(slot)
        require_fit(slot, patch.changes[name], name in patch.transposed)
    require_untied(model, slots.values())
    its = fingerprint(model, patch.fingerprinted)
    made_for = patch.made_for
    if made_for.get("architecture") != its["architecture"]:
        raise BadInput(
            f"the patch was made for {made_for.get('architecture')}, this model is {its['architecture']}: "
            "its class, or a name, shape or dtype of its parameters differs"
        )
    if made_for.get("weights") != its["weights"]:
        raise BadInput(
            f"the patch was made for other values of the weights that it changes ({some(patch.changes)}) than this "
            f"{type(model).__name__} has{_who_changed(patch, model)}"
        )
    return slots


def _who_changed(patch: Patch, model: nn.Module) -> str:
    own = {slot.parameter for slot in find(model, patch.changes).values()}
    for other in _APPLIED.get(model, []):
        shared = own & {slot.parameter for slot in find(model, other.patch.changes).values()}
        if shared:
            return f": {said(other.patch)}, which lies on it, changes {some(shared)} too; remove that one first"
    return ""


# -- on and off ------------------------------------------------------------------------------------


def apply(patch: Patch, model: nn.Module, merge: bool) -> Receipt:
    """Puts the patch on the model, or leaves the model wholly as it was.

    Args:
        merge: into the weights; False keeps the changes beside them, as factors.

    Raises:
        BadInput: see `check`; or the patch has no merged form, or a weight is read-only or would overflow.
    """
    if any(_same(applied.patch, patch) for applied in _APPLIED.get(model, [])):
        raise BadInput(f"{said(patch)} is on this {type(model).__name__} already")
    if merge and (patch.tokens == "each" or any(c.per_token for c in patch.changes.values())):
        raise BadInput(
            "the patch holds different values for every token (or prompt), so it cannot be merged into the weights; "
            "use merge=False, which keeps them beside the weights"
        )
    slots = check(patch, model)
    with sole_use(model), torch.inference_mode(False), torch.no_grad():
        return _merge(patch, model, slots) if merge else _put_beside(patch, model, slots)


def remove(patch: Patch, model: nn.Module) -> None:
    """Takes the patch off: every byte of every parameter is as it was before `apply`.

    Raises:
        BadInput: the patch is not on the model, another one lies above it, or a changed parameter has been
            exchanged for one of another shape or dtype since.
    """
    stack = _APPLIED.get(model) or _carried(model)
    place = next((i for i, applied in enumerate(stack) if _same(applied.patch, patch)), None)
    if place is None:
        raise BadInput(f"{said(patch)} is not on this {type(model).__name__}")
    if place < len(stack) - 1:
        above = ", then ".join(said(applied.patch) for applied in reversed(stack[place + 1 :]))
        raise BadInput(f"{said(patch)} lies under others on this {type(model).__name__}; remove first {above}")
    with sole_use(model), torch.inference_mode(False), torch.no_grad():
        stack[-1].restore(model)
    stack.pop()


def _carried(model: nn.Module) -> list[Applied]:
    """The patches that a copied model carries beside its parameters, in the order in which they lie."""
    found: dict[int, Factored] = {}
    for parameter in named(model).values():
        layers = []
        while isinstance(parameter, Intercepted):
            layers.append(parameter.handler)
            parameter = parameter.plain
        found.update({id(h): h for h in reversed(layers) if isinstance(h, Factored)})
    return [Applied(h.patch, lambda model, h=h: uncover(model, h)) for h in found.values()]  # type: ignore[misc]


def _same(one: Patch, other: Patch) -> bool:
    """Whether two patches are one, perhaps saved and loaded in between."""
    if one is other:
        return True
    mine, its = ((dict(p.made_for), p.query, p.changes.keys()) for p in (one, other))
    return mine == its and all(_digest(one.changes[name]) == _digest(other.changes[name]) for name in one.changes)


def _digest(change: Change) -> bytes:
    found = hashlib.sha256()
    for part in _parts(change):
        found.update(np.ascontiguousarray(part, np.float32).tobytes())
    return found.digest()


def _parts(change: Change) -> tuple[np.ndarray, ...]:
    return (change.left, change.right) if isinstance(change, MatrixChange) else (change.delta,)


def untie(model: nn.Module, name: str) -> None:
    """Gives the parameter `name` its own memory; whatever shared it keeps the old one. No value changes.

    A Hugging Face model is told so (`config.tie_word_embeddings`), lest a saved copy be tied again when loaded.

    Raises:
        BadInput: there is no such parameter, it shares memory with none, or a patch lies on the model.
    """
    if _APPLIED.get(model):
        raise BadInput("a patch lies on the model; remove it before untying")
    slot = find(model, [name])[name]
    require_plain(slot)
    if slot.index is not None or not tied_with(model, name):
        raise BadInput(f"{name} shares its memory with no other parameter or buffer")
    path, _, leaf = name.rpartition(".")
    own = nn.Parameter(slot.whole.detach().clone(), requires_grad=slot.whole.requires_grad)
    setattr(model.get_submodule(path), leaf, own)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


# -- merged ----------------------------------------------------------------------------------------


def _merge(patch: Patch, model: nn.Module, slots: Mapping[str, Slot]) -> Receipt:
    for slot in slots.values():
        if slot.whole.is_inference():
            raise BadInput(
                f"{slot.parameter} was made in torch.inference_mode() and is read-only; use merge=False, or load the "
                "model outside of it"
            )
    values = {name: _finite(name, slot, patch) for name, slot in slots.items()}
    by_parameter = _by_parameter(slots)
    originals = {parameter: own[0].whole.data for parameter, own in by_parameter.items()}
    try:
        for own in by_parameter.values():
            _put(own[0].whole, _whole(own, values))
        rows = [row(s, patch.changes[n], "merged", _difference(s.tensor, values[n])) for n, s in slots.items()]
        _APPLIED.setdefault(model, []).append(Applied(patch, lambda model: _restore(model, originals)))
    except BaseException:
        for parameter, original in originals.items():
            _put(by_parameter[parameter][0].whole, original)
        raise
    return Receipt(tuple(rows), patch.validity)


def _finite(name: str, slot: Slot, patch: Patch) -> Tensor:
    value = merged_value(slot.tensor, patch.changes[name], name in patch.transposed)
    if not value.isfinite().all():
        raise BadInput(f"{name} does not hold the change: {value.dtype} overflows; use merge=False")
    return value


def _by_parameter(slots: Mapping[str, Slot]) -> dict[str, list[Slot]]:
    """The slots of each parameter: itself, or slices of it."""
    found: dict[str, list[Slot]] = {}
    for slot in slots.values():
        found.setdefault(slot.parameter, []).append(slot)
    return found


def _whole(slots: list[Slot], values: Mapping[str, Tensor]) -> Tensor:
    """A parameter's new numbers: those of its slot, or the stack with its changed slices."""
    if slots[0].index is None:
        return values[slots[0].name]
    stack = slots[0].whole.detach().clone()
    for slot in slots:
        stack[slot.index] = values[slot.name]
    return stack


def _restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    slots = find(model, originals)
    for name, original in originals.items():
        found = slots[name].tensor
        if (found.shape, found.dtype, found.device) != (original.shape, original.dtype, original.device):
            raise BadInput(
                f"{name} was {list(original.shape)} {original.dtype} on {original.device} when the patch was put on, "
                f"and is {list(found.shape)} {found.dtype} on {found.device} now; bring it back (.to), then remove the "
                "patch"
            )
    for name, original in originals.items():
        _put(slots[name].whole, original)


def _put(parameter: Tensor, value: Tensor) -> None:
    """Gives the parameter other numbers; the memory of those it had is left as it is (it may be read-only)."""
    parameter.data = value


def _difference(found: Tensor, meant: Tensor) -> float:
    return 0.0 if torch.equal(found, meant) else float((found.double() - meant.double()).abs().max())


# -- beside the weights ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factored:
    """Gives the results that the model's calls have with a patch's changes, kept beside the parameters.

    Attributes:
        slots: the patch's, by parameter and the index of a slice.
    """

    patch: Patch
    slots: Mapping[str, Mapping[int | None, Slot]]
    factors: Factors = field(default_factory=Factors)

    def __call__(self, event: Event) -> Tensor | None:
        beside: dict[str, Change] = {}
        stacks: dict[str, Tensor] = {}
        for name in event.names:
            own = self.slots[name]
            if None in own:
                beside[name] = self.patch.changes[name]
            elif (product := event.product(name)) is not None and product.index is not None:
                if product.index in own:
                    slot = own[product.index].name
                    beside[slot] = self.patch.changes[slot]
            else:
                stacks[name] = self._stack(event.parameter(name), own)
        if stacks:
            if any(change.per_token for change in beside.values()):
                raise BadInput(f"{some(beside)} and a stack are read at once; a stack has no values for each token")
            whole = {n: merged_value(event.parameter(n), c, n in self.patch.transposed) for n, c in beside.items()}
            return event.with_values(stacks | whole)
        if not beside:
            return None
        self._require_query(event, beside)

        def stored(name: str) -> Tensor:
            return event.parameter(name)

        return changed_result(event, beside, self.patch.transposed, self.patch.batch, stored, self.factors)

    def _require_query(self, event: Event, beside: Mapping[str, Change]) -> None:
        """Refuses other prompts with as many tokens in all: rows would be mistaken for one another."""
        batch, tokens = self.patch.batch, len(self.patch.query) // self.patch.batch
        own = any(change.per_token for change in beside.values())
        if not own or event.output.dim() < 3:
            return
        each = any(len(_parts(change)[0]) == batch * tokens for change in beside.values())
        ran = tuple(event.output.shape[:2])
        fits = ran in ((batch, tokens), (tokens, batch) if batch == 1 else ()) if each else ran[0] == batch
        if not fits:
            raise BadInput(
                f"the patch holds values for {batch} prompt(s) of {tokens} token(s) each ({some(beside)}), "
                f"and the model was run on {list(ran)}"
            )

    def _stack(self, parameter: Tensor, own: Mapping[int | None, Slot]) -> Tensor:
        """The whole stack with its changed slices, for calls that read several at once."""
        changed = parameter.detach().clone()
        for index, slot in own.items():
            change = self.patch.changes[slot.name]
            if change.per_token:
                raise BadInput(f"{slot.name} is read with its whole stack, so it cannot have a value for each token")
            changed[index] = merged_value(changed[index], change, slot.name in self.patch.transposed)
        return changed

    def digest(self, parameter: str) -> bytes:
        """A hash of what is kept beside the parameter."""
        return b"".join(_digest(self.patch.changes[slot.name]) for slot in self.slots[parameter].values())


def _put_beside(patch: Patch, model: nn.Module, slots: Mapping[str, Slot]) -> Receipt:
    by_parameter = {name: {slot.index: slot for slot in own} for name, own in _by_parameter(slots).items()}
    handler = Factored(patch, by_parameter)
    restore = intercept(model, list(by_parameter), handler)
    try:
        found = named(model)
        for name in by_parameter:
            if getattr(found[name], "handler", None) is not handler:
                raise BadInput(f"{name} cannot be intercepted: its module gives another tensor back")
        rows = tuple(row(slot, patch.changes[name], "factored", 0.0) for name, slot in slots.items())
        _APPLIED.setdefault(model, []).append(Applied(patch, lambda _: restore()))
    except BaseException:
        restore()
        raise
    return Receipt(rows, patch.validity)
