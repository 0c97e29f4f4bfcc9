"""A patch put on a model that is in memory, and taken off again.

Everything is checked before anything is changed, and whatever fails on the way leaves the model as it was, byte for
byte: the originals are kept, never worked out again. Several patches lie on a model like plates: the last one that was
put on is the first that comes off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.graph.changes import Change
from blockkit.graph.changes import digest as change_digest
from blockkit.graph.changes import parts as change_parts
from blockkit.patch.in_place import ChangedParameter, Receipt
from blockkit.patch.patch import ALLOWED, Patch

from ..calling.exclusive import sole_use
from ..watching.intercepted import Event, Intercepted
from ..watching.interception import intercept, uncover
from .changed import Factors, changed_result, merged_value
from .identity import architecture, is_same
from .receipts import row, said, some
from .restoring import NoLongerOn, Original, restore
from .slots import Slot, find, named, require_fit, require_plain, require_untied, tied_with


@dataclass(frozen=True, eq=False)
class Applied:
    """A patch that lies on a model, and how it is taken off."""

    patch: Patch
    restore: Callable[[nn.Module], None]


_APPLIED: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()


# -- which model a patch is for --------------------------------------------------------------------


def check(patch: Patch, model: nn.Module) -> dict[str, Slot]:
    """Refuses a model for which the patch was not made, or whose parameters cannot be changed; gives the slots.

    Raises:
        BadInput: a slot does not exist, has another shape, is quantised, not loaded or tied, or the weights differ.
    """
    slots = _fitting(patch, model)
    if not is_same(model, patch.made_for, patch):
        what = "" if "digest" in patch.made_for else f"the weights that it changes ({some(patch.changes)}) in "
        raise BadInput(
            f"the patch was made for other values of {what or 'the parameters or buffers of '}this "
            f"{type(model).__name__}{_who_changed(patch, model)}. {ALLOWED}"
        )
    return slots


def _fitting(patch: Patch, model: nn.Module) -> dict[str, Slot]:
    """The slots, which are those of a model of the patch's kind."""
    slots = find(model, patch.changes)
    for name, slot in slots.items():
        require_plain(slot)
        require_fit(slot, patch.changes[name], name in patch.transposed)
    require_untied(model, slots.values())
    mine, its = patch.made_for.get("architecture"), architecture(model)
    if mine != its:
        raise BadInput(
            f"the patch was made for {mine}, this model is {its}: its class, or a name, shape or dtype of its "
            "parameters differs"
        )
    return slots


def _who_changed(patch: Patch, model: nn.Module) -> str:
    lying = _APPLIED.get(model, [])
    if not lying:
        return ""
    own = {slot.parameter for slot in find(model, patch.changes).values()}
    changed = {slot.parameter for slot in find(model, lying[-1].patch.changes).values()}
    shared = own & changed
    too = f"{some(shared)} too" if shared else some(changed)
    return f": {said(lying[-1].patch)}, which lies on it, changes {too}; remove that one first"


# -- on and off ------------------------------------------------------------------------------------


def apply(patch: Patch, model: nn.Module, merge: bool, allow_other_weights: bool = False) -> Receipt:
    """Puts the patch on the model, or leaves the model wholly as it was.

    Args:
        merge: into the weights; False keeps the changes beside them, as factors.
        allow_other_weights: on other values than it was made for too; the receipt then claims nothing.

    Raises:
        BadInput: see `check`; or the patch has no merged form, or a weight is read-only or would overflow.
    """
    if any(applied.patch.same_as(patch) for applied in _stack(model)):
        raise BadInput(f"{said(patch)} is on this {type(model).__name__} already")
    if merge and (patch.tokens == "each" or any(c.per_token for c in patch.changes.values())):
        raise BadInput(
            "the patch holds different values for every token (or prompt), so it cannot be merged into the weights; "
            "use merge=False, which keeps them beside the weights"
        )
    slots = _fitting(patch, model) if allow_other_weights else check(patch, model)
    same = not allow_other_weights or is_same(model, patch.made_for, patch)
    with sole_use(model), torch.inference_mode(False), torch.no_grad():
        rows = _merge(patch, model, slots) if merge else _put_beside(patch, model, slots)
    return Receipt(rows, patch.validity_on(same), same and patch.whole)


def remove(patch: Patch, model: nn.Module) -> None:
    """Takes the patch off: every byte of every parameter is as it was before `apply`.

    Raises:
        BadInput: the patch is not on the model (any more), another one lies above it, or a changed parameter holds
            other numbers, or has another shape or dtype, than the patch gave it.
    """
    stack = _stack(model)
    place = next((i for i, applied in enumerate(stack) if applied.patch.same_as(patch)), None)
    if place is None:
        raise BadInput(f"{said(patch)} is not on this {type(model).__name__}")
    if place < len(stack) - 1:
        above = ", then ".join(said(applied.patch) for applied in reversed(stack[place + 1 :]))
        raise BadInput(f"{said(patch)} lies under others on this {type(model).__name__}; remove first {above}")
    with sole_use(model, wait=True), torch.inference_mode(False), torch.no_grad():
        try:
            stack[-1].restore(model)
        except NoLongerOn:
            stack.pop()
            raise
        stack.pop()


def _stack(model: nn.Module) -> list[Applied]:
    """The patches on a model: put on it, on what it now wraps, or carried by a copy."""
    return next((_APPLIED[m] for m in model.modules() if _APPLIED.get(m)), None) or _carried(model)


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


def _merge(patch: Patch, model: nn.Module, slots: Mapping[str, Slot]) -> tuple[ChangedParameter, ...]:
    for slot in slots.values():
        if slot.whole.is_inference():
            raise BadInput(
                f"{slot.parameter} was made in torch.inference_mode() and is read-only; use merge=False, or load the "
                "model outside of it"
            )
    values, parameters = merged_values(patch, slots), by_parameter(slots)
    originals = [Original.of(parameter, own) for parameter, own in parameters.items()]
    try:
        for own in parameters.values():
            _put(own[0].whole, whole_value(own, values))
        rows = [row(s, patch.changes[n], "merged", _difference(s.tensor, values[n])) for n, s in slots.items()]
        _APPLIED.setdefault(model, []).append(Applied(patch, lambda model: restore(patch, model, originals)))
    except BaseException:
        for original in originals:
            _put(original.slots[0].whole, original.values)
        raise
    return tuple(rows)


def merged_values(patch: Patch, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """The slots' new numbers.

    Raises:
        BadInput: one overflows in its dtype.
    """
    return {name: _finite(name, slot, patch) for name, slot in slots.items()}


def _finite(name: str, slot: Slot, patch: Patch) -> Tensor:
    value = merged_value(slot.tensor, patch.changes[name], name in patch.transposed)
    if not value.isfinite().all():
        raise BadInput(f"{name} does not hold the change: {value.dtype} overflows; use merge=False")
    return value


def by_parameter(slots: Mapping[str, Slot]) -> dict[str, list[Slot]]:
    """The slots of each parameter: itself, or slices of it."""
    found: dict[str, list[Slot]] = {}
    for slot in slots.values():
        found.setdefault(slot.parameter, []).append(slot)
    return found


def whole_value(slots: list[Slot], values: Mapping[str, Tensor]) -> Tensor:
    """A parameter's new numbers: those of its slot, or the stack with its changed slices."""
    if slots[0].index is None:
        return values[slots[0].name]
    stack = slots[0].whole.detach().clone()
    for slot in slots:
        stack[slot.index] = values[slot.name]
    return stack


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

    @staticmethod
    def of(patch: Patch, parameters: Mapping[str, list[Slot]]) -> Factored:
        """For the slots of each parameter; see `by_parameter`."""
        return Factored(patch, {name: {slot.index: slot for slot in own} for name, own in parameters.items()})

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
        each = any(len(change_parts(change)[0]) == batch * tokens for change in beside.values())
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
        return b"".join(change_digest(self.patch.changes[slot.name]) for slot in self.slots[parameter].values())


def _put_beside(patch: Patch, model: nn.Module, slots: Mapping[str, Slot]) -> tuple[ChangedParameter, ...]:
    parameters = by_parameter(slots)
    handler = Factored.of(patch, parameters)
    restore_all = intercept(model, list(parameters), handler)
    try:
        found = named(model)
        for name in parameters:
            if getattr(found[name], "handler", None) is not handler:
                raise BadInput(f"{name} cannot be intercepted: its module gives another tensor back")
        rows = tuple(row(slot, patch.changes[name], "factored", 0.0) for name, slot in slots.items())
        _APPLIED.setdefault(model, []).append(Applied(patch, lambda _: _uncovered(patch, restore_all())))
    except BaseException:
        restore_all()
        raise
    return rows


def _uncovered(patch: Patch, exchanged: list[str]) -> None:
    """Says which parameters are no longer those that the patch was put beside."""
    if exchanged:
        warnings.warn(
            f"{some(exchanged)} were exchanged while {said(patch)} was on (load_state_dict(assign=True)?): what was "
            "put there stays, without the patch",
            stacklevel=5,
        )
